# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Reads the annotation files of the paper's data sets, and writes what avdet2 trains and tests on.
"""
