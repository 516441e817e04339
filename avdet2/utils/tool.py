# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
How every tool ends: a user's mistake is one line on the console, its traceback is in the log.
"""

import builtins
import logging
import os
import re
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["mistake_of", "run_tool"]

# By these avdet2 says what is to be changed. MediaError is a ValueError.
MISTAKES = (ValueError, OSError, FloatingPointError)
# How Detectron2's catalogs and registries begin to say that they do not have a name.
NO_SUCH_NAME = ("Dataset '", "No object named")
# What another process raised: its traceback is part of the message.
OF_PROCESS = re.compile(
    r"Traceback \(most recent call last\):\n.*^(?:\w+\.)*(\w+): (.*)", re.S | re.M
)


def run_tool(main: Callable[..., Any], *args: Any) -> None:
    """
    Call a tool's main function. A user's mistake ends the program with one line, which says what
    is wrong and what to do, and exit code 1; its traceback goes into the log.txt of OUTPUT_DIR,
    where there is one. With AVDET2_TRACEBACK=1 in the environment it is printed, as that of every
    other error is.

    Args:
        main: takes `args`.
    """
    try:
        main(*args)
    except Exception as error:
        cause = mistake_of(error)
        if cause is None or os.environ.get("AVDET2_TRACEBACK"):
            raise
        files = _write_traceback(error)
        where = f" (traceback: {', '.join(files)})" if files else ""
        sys.exit(f"{os.path.basename(sys.argv[0])}: error: {cause}{where}")


def mistake_of(error: BaseException) -> str | None:
    """
    What an error tells the user in one line; None where the program, and not the user, is wrong.
    """
    text, kind = str(error), type(error)
    found = OF_PROCESS.search(text)
    if found:
        # Of a data loader's worker, or of a process that was started.
        name, text = found.groups()
        kind = ValueError if name == "MediaError" else getattr(builtins, name, Exception)
    if issubclass(kind, KeyError):
        text = text.strip("\"'") if found else str(error.args[0] if error.args else "")
        return _one_line(text) if text.startswith(NO_SUCH_NAME) else None
    return _one_line(text) if issubclass(kind, MISTAKES) and text.strip() else None


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _write_traceback(error: BaseException) -> list[str]:
    """
    Write it to the files of avdet2's logger; returns their names.
    """
    logger, names = logging.getLogger("avdet2"), []
    info = (type(error), error, error.__traceback__)
    record = logger.makeRecord(logger.name, logging.ERROR, "", 0, "the run has ended", (), info)
    for handler in logger.handlers:
        stream = getattr(handler, "stream", None)
        if stream not in (None, sys.stdout, sys.stderr) and isinstance(
            getattr(stream, "name", None), str
        ):
            handler.handle(record)
            names.append(stream.name)
    return names
