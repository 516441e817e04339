# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Tests of what each kind of stage says of its classes.
"""

from types import SimpleNamespace

import pytest

from avdet2.engine import load_cfg
from avdet2.engine.stages import stage_kind


@pytest.mark.parametrize(
    "architecture, mapper, labels, has_clusters, kind",
    [
        ("AVLocalizer", "AVMapper", "none", True, "clusters"),
        ("AVLocalizer", "AVMapper", "none", False, "none"),
        ("CenterBox", "DatasetMapper", "none", False, "none"),
        ("GeneralizedRCNN", "DatasetMapper", "self", False, "names"),
        ("GeneralizedRCNN", "SelfBoxMapper", "self", False, "clusters"),
        ("GeneralizedRCNN", "SelfBoxMapper", "video", False, "labels"),
        ("GeneralizedRCNN", "SelfBoxMapper", "none", False, "none"),
    ],
)
def test_where_names_come_from(architecture, mapper, labels, has_clusters, kind):
    cfg = load_cfg("")
    cfg.MODEL.META_ARCHITECTURE, cfg.INPUT.MAPPER = architecture, mapper
    cfg.MODEL.SELF_BOX.LABELS = labels
    cfg.MODEL.LOCALIZER.LAMBDA = 0.5 if has_clusters else 1.0
    model = SimpleNamespace(has_clusters=has_clusters)
    assert stage_kind(cfg).class_names(model).kind == kind
