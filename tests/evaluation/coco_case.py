# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Made-up ground truth and detections, as many as wanted.
"""

from avdet2.benchmark.evaluation import random_case

__all__ = ["random_case"]
