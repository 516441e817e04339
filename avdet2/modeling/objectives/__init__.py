# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
from avdet2.modeling.objectives.contrastive import AttentionLoss, ClusterLoss  # noqa: F401
from avdet2.modeling.objectives.correspondence import CorrespondenceLoss  # noqa: F401
from avdet2.modeling.objectives.nce import NCELoss  # noqa: F401
from avdet2.modeling.objectives.objective import (  # noqa: F401
    OBJECTIVE_REGISTRY,
    Objective,
    build_objective,
)
from avdet2.modeling.objectives.triplet import TripletLoss  # noqa: F401
