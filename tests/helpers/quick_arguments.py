# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
What tools/benchmark hands to a task, for quick runs.
"""

import argparse


def arguments(**changes):
    given = {"rounds": 1, "config_file": "", "opts": [], "device": "cpu", "quick": True}
    given |= {"clips": "", "prepared": "", "output": ""}
    return argparse.Namespace(**{**given, **changes})
