# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
from avdet2.evaluation.baselines.boxes import (  # noqa: F401
    BoxBaseline,
    BoxRule,
    CenterBox,
    FullFrame,
)
from avdet2.evaluation.baselines.rpn import ClassAgnosticRPN  # noqa: F401
from avdet2.evaluation.baselines.selective_search import SelectiveSearch  # noqa: F401
