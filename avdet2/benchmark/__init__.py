# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
What avdet2's parts cost, each beside a plain way to do the same: see tools/benchmark.py.
"""
