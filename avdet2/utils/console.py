# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
What of the log a person reads on the console: stages, progress, losses, results and, once, each
warning. The log's file has everything.
"""

import logging
import re
import sys

__all__ = ["quiet_console"]

# How messages begin that fill screens, or that nobody waits for. In the first one, "detectron2._C
# not built" is no fault: avdet2 needs no compiled operators.
FILE_ONLY = (
    "Environment info:",
    "Command line arguments:",
    "Contents of args.config_file=",
    "Running with full config:",
    "Model:\n",
    "Rank of current process:",
    "Serializing ",
    "Serialized dataset takes",
)
# Parameters that a stage does not take over from the stage before it, which has none of this shape.
NEW_IN_STAGE = ("cls_a.", "cls_v.", "roi_heads.box_predictor.cls_score.")
SKIPPED = "Skip loading parameter '"
MISSING = "Some model parameters or buffers are not found in the checkpoint:\n"


def quiet_console() -> None:
    """
    Let the console handlers of avdet2's and Detectron2's loggers, as far as there are any, leave
    out what only the log's file needs.
    """
    for name in ("detectron2", "fvcore", "avdet2"):
        for handler in logging.getLogger(name).handlers:
            if getattr(handler, "stream", None) in (sys.stdout, sys.stderr):
                handler.addFilter(_for_console)


class _ForConsole(logging.Filter):
    def __init__(self) -> None:
        super().__init__()
        self._told: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        # What ends the program is printed in any case.
        if record.exc_info:
            return False
        # fvcore colours the names of parameters.
        text = re.sub(r"\x1b\[\d+m", "", record.getMessage())
        if text.startswith(FILE_ONLY) or text in self._told:
            return False
        if text.startswith((SKIPPED, MISSING)):
            names = text.removeprefix(SKIPPED).removeprefix(MISSING).splitlines()
            return not all(name.startswith(NEW_IN_STAGE) for name in names)
        if record.levelno >= logging.WARNING:
            self._told.add(text)
        return True


# One for all, so that a handler has it once.
_for_console = _ForConsole()
