# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The command ``avdet2``: what stands in tools/, wherever avdet2 is installed.

``avdet2 train ...`` is ``python tools/train_net.py ...``.
"""

import argparse
import ast
import re
import runpy
import sys
from pathlib import Path

from avdet2 import __version__, model_zoo

# A link to the checkout's tools; in an installed package, the files themselves.
TOOLS = Path(__file__).parent / "tools"
SHORT = {"train_net": "train", "run_pipeline": "pipeline"}


def commands() -> dict[str, Path]:
    """
    Names of the subcommands, with their scripts.
    """
    # avdet2 cannot be imported before Detectron2 is there.
    files = sorted(set(TOOLS.glob("[!_]*.py")) - {TOOLS / "install_detectron2.py"})
    return {SHORT.get(file.stem, file.stem.replace("_", "-")): file for file in files}


def make_parser() -> argparse.ArgumentParser:
    """
    The parser of the first word.
    """
    known = commands()
    width = max(map(len, known))
    lines = [f"  {name:{width}}  {_first_sentence(file)}" for name, file in known.items()]
    parser = argparse.ArgumentParser(
        prog="avdet2",
        description="Object detectors learned from unlabelled videos.",
        epilog="\n".join(["commands:", *lines, "", "avdet2 COMMAND --help says more of one."]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"avdet2 {__version__}")
    parser.add_argument("command", choices=known, metavar="COMMAND", help="see below")
    return parser


def _first_sentence(file: Path) -> str:
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return re.split(r"[.:]\s", text)[0].replace("\n", " ").rstrip(".")


def with_known_configs(words: list[str]) -> list[str]:
    """
    The words, where the config file that --config-file names is one that comes with avdet2, unless
    there is a file of this name; it may begin with ``configs/``, as in the documentation.
    """
    words = [part for word in words for part in _split_flag(word)]
    for i, word in enumerate(words[1:], 1):
        if words[i - 1] == "--config-file" and not Path(word).is_file():
            try:
                words[i] = model_zoo.get_config_file(word.removeprefix("configs/"))
            except ValueError:
                # The tool says what is missing.
                continue
    return words


def _split_flag(word: str) -> list[str]:
    return word.split("=", 1) if word.startswith("--config-file=") else [word]


def main() -> None:
    """
    Run the tool that the first word names with all others.
    """
    command = make_parser().parse_args(sys.argv[1:2]).command
    tool = str(commands()[command])
    # As Python itself does for a script.
    sys.path.insert(0, str(TOOLS))
    sys.argv = [tool, *with_known_configs(sys.argv[2:])]
    runpy.run_path(tool, run_name="__main__")


if __name__ == "__main__":
    main()
