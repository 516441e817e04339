# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Which kind of stage a config is of, and a kind of one's own.
"""

from pathlib import Path

import pytest

from avdet2.engine import AVTrainer, load_cfg
from avdet2.engine.stages import STAGE_KINDS, StageKind, stage_kind

CONFIGS = Path(__file__).resolve().parents[3] / "configs"


@pytest.mark.parametrize(
    ("config", "opts", "name"),
    [
        ("AV-Localization/pretrain.yaml", [], "LocalizerStage"),
        ("SimCLR/simclr_R50.yaml", [], "SimCLRStage"),
        ("Unsupervised-Detection/warmup_R50_FPN.yaml", [], "SelfBoxDetectorStage"),
        ("Unsupervised-Detection/warmup_R50_FPN.yaml", ["INPUT.MAPPER", "AVMapper"], "StageKind"),
        # It has a localizer in its config that it does not use.
        ("quick_schedules/synthetic_center_box.yaml", [], "BoxBaselineStage"),
        ("Baselines/coco_rpn_R50_FPN.yaml", ["INPUT.MAPPER", "SelfBoxMapper"], "BoxBaselineStage"),
        ("", [], "StageKind"),
    ],
)
def test_the_kind_of_a_config(config, opts, name):
    kind = stage_kind(load_cfg(str(CONFIGS / config) if config else "", opts))
    assert type(kind).__name__ == name
    assert kind.trains == (name != "BoxBaselineStage")
    assert kind.is_evaluated == (name != "SimCLRStage")


def test_a_kind_of_one_s_own(monkeypatch):
    class Mine(StageKind):
        mapper = "MyMapper"

        @classmethod
        def fits(cls, cfg, model_class):
            return cfg.INPUT.MAPPER == cls.mapper

        def build_train_loader(self):
            return [self.cfg.SEED]

    cfg = load_cfg("", ["INPUT.MAPPER", "MyMapper", "SEED", "5"])
    with pytest.raises(ValueError, match="INPUT.MAPPER must be DatasetMapper .*'MyMapper'"):
        AVTrainer.build_train_loader(cfg)
    monkeypatch.setattr("avdet2.engine.stages.STAGE_KINDS", [Mine, *STAGE_KINDS])
    assert AVTrainer.build_train_loader(cfg) == [5]
