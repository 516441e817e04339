# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
from avdet2.modeling.avol import (  # noqa: F401
    AUDIO_ENCODER_REGISTRY,
    build_avol_backbone,
    build_avol_fpn_backbone,
)
from avdet2.modeling.best_match import BestMatchROIHeads, BestMatchRPN  # noqa: F401
from avdet2.modeling.drop_loss import DropLossROIHeads, DropLossRPN  # noqa: F401
from avdet2.modeling.meta_arch import AVLocalizer, SimCLR  # noqa: F401
from avdet2.modeling.tf_stem import (  # noqa: F401
    build_tf_stem_resnet_backbone,
    build_tf_stem_resnet_fpn_backbone,
)
from avdet2.modeling.timm_backbone import (  # noqa: F401
    build_timm_backbone,
    build_timm_fpn_backbone,
)
