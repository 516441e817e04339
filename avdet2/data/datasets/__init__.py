# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
from avdet2.data.datasets import builtin  # noqa: F401
