# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Configs by name.
"""

from pathlib import Path

import pytest

import avdet2
from avdet2.model_zoo import get_config, get_config_file

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
JOINT = "AV-Localization/joint_K39.yaml"


def test_every_config_has_its_name():
    files = sorted(CONFIGS.rglob("*.yaml"))
    assert len(files) > 30
    for file in files:
        assert Path(get_config_file(str(file.relative_to(CONFIGS)))).samefile(file)


def test_a_config_is_the_file_s():
    cfg = get_config(JOINT, ["SEED", "5"])
    assert cfg.SEED == 5
    assert cfg.MODEL.LOCALIZER.NUM_CLUSTERS == 39
    assert get_config(JOINT).dump() == avdet2.load_cfg(str(CONFIGS / JOINT)).dump()


def test_a_misspelt_name_gets_the_nearest_ones():
    with pytest.raises(ValueError, match="no config pipelineK39.yaml; it has pipeline_K39.yaml"):
        avdet2.model_zoo.get_config("pipelineK39.yaml")
    with pytest.raises(ValueError, match=r"no config \.\.; it has .*Base-AVLocalizer.yaml, Base"):
        get_config_file("..")
