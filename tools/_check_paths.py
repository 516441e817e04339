# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
What a command line names is looked for before PyTorch is imported, which takes seconds.
"""

import glob
import os
import sys
from collections.abc import Collection

# The keys of own data, which most tools take.
OWN_DATA = ("DATASETS.VIDEOS", "DATASETS.TEST_JSON", "DATASETS.TEST_IMAGES")


def check_paths(
    files: Collection[str] = (), folders: Collection[str] = (), paths: Collection[str] = ()
) -> None:
    """
    End the program with one line where something is missing, or a folder is empty. What is not
    seen here (of several words only the first one is looked at), the tool finds later.

    Args:
        files: flags with the path of a file; "" stands for the tool's first word.
        folders: with that of a folder.
        paths: with a path, prefix or pattern of anything.
    """
    words = sys.argv[1:]
    pairs = [word.split("=", 1) for word in words if word.startswith("--") and "=" in word]
    pairs += zip(["", *words], words)
    for flag, value in pairs:
        is_path = flag in paths or flag in OWN_DATA
        known = is_path or flag in files or flag in folders
        if not known or not value or value.startswith("-"):
            continue
        wrong = ""
        if flag in files and not os.path.isfile(value):
            wrong = "no such file"
        elif flag in folders and not os.path.isdir(value):
            wrong = "no such folder"
        elif is_path and not (os.path.exists(value) or glob.glob(f"{value}*")):
            wrong = "no such file or folder"
        elif os.path.isdir(value) and not os.listdir(value):
            wrong = "the folder is empty"
        if wrong:
            sys.exit(
                f"{os.path.basename(sys.argv[0])}: error: {f'{flag} {value}'.strip()}: {wrong}"
            )
