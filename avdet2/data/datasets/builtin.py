# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Data sets that exist by name as soon as avdet2 is imported.
"""

import os

from avdet2.data.datasets.synthetic import register_synthetic

# The root is Detectron2's; nothing is read before a data set is used.
_root = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
register_synthetic(os.path.join(_root, "synthetic_av"))
