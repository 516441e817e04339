# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Progress bars that do not fill a log.
"""

import sys
from typing import Any

from tqdm import tqdm

# Seconds between two updates where nobody watches.
IN_A_FILE = 60.0


def progress(*args: Any, **kwargs: Any) -> tqdm:
    """
    tqdm with the same arguments; where stderr is no terminal, it writes once a minute.
    """
    return tqdm(*args, mininterval=0.1 if sys.stderr.isatty() else IN_A_FILE, **kwargs)
