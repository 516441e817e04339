# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
PIPELINE.STAGES as a list of mappings, and as the parallel lists of older configs.
"""

from pathlib import Path

import pytest

from avdet2.config_file import load_cfg
from avdet2.engine.pipeline import listed_stages, make_stages

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "quick_schedules"
MAPPINGS = f"""
PIPELINE:
  STAGES:
    - NAME: "first"
      CONFIG: "{CONFIGS}/synthetic_pretrain.yaml"
    - NAME: "second"
      CONFIG: "{CONFIGS}/synthetic_joint.yaml"
      OPTIONS:
        MODEL.LOCALIZER.NUM_CLUSTERS: 8
        INPUT.AV.SAMPLE_RATE: 16000
        DATASETS.TRAIN: ("synthetic_av_val",)
  OPTIONS:
    - ["SEED", "7"]
"""
LISTS = f"""
PIPELINE:
  STAGES: ("first", "second")
  CONFIGS:
    - "{CONFIGS}/synthetic_pretrain.yaml"
    - "{CONFIGS}/synthetic_joint.yaml"
  OPTIONS:
    - ["second:MODEL.LOCALIZER.NUM_CLUSTERS", "8"]
    - ["second:INPUT.AV.SAMPLE_RATE", "16000"]
    - ["second:DATASETS.TRAIN", "('synthetic_av_val',)"]
    - ["SEED", "7"]
"""


def _written(path: Path, text: str) -> str:
    path.write_text(text + "VERSION: 2\n")
    return str(path)


def _stages(path: Path, text: str, *opts: str) -> dict[str, str]:
    stages = make_stages(_written(path, text), ["OUTPUT_DIR", str(path.parent), *opts])
    return {stage.name: stage.cfg.dump() for stage in stages}


def test_both_forms_are_one_pipeline(tmp_path):
    stages = _stages(tmp_path / "a.yaml", MAPPINGS)
    assert list(stages) == ["first", "second"]
    assert stages == _stages(tmp_path / "b.yaml", LISTS)
    assert "NUM_CLUSTERS: 8" in stages["second"] and "SAMPLE_RATE: 16000" in stages["second"]
    assert "NUM_CLUSTERS: 8" not in stages["first"] and "SEED: 7" in stages["first"]
    assert "- synthetic_av_val" in stages["second"]


def test_the_command_line_has_the_last_word(tmp_path):
    opts = "second:MODEL.LOCALIZER.NUM_CLUSTERS", "5"
    for name, text in (("a.yaml", MAPPINGS), ("b.yaml", LISTS)):
        stages = _stages(tmp_path / name, text, *opts)
        assert "NUM_CLUSTERS: 5" in stages["second"] and "SAMPLE_RATE: 16000" in stages["second"]


def test_a_dumped_config_has_the_same_stages(tmp_path):
    cfg = load_cfg(_written(tmp_path / "a.yaml", MAPPINGS))
    (tmp_path / "dumped.yaml").write_text(cfg.dump())
    again = load_cfg(str(tmp_path / "dumped.yaml"))
    first, (_, _, opts) = listed_stages(again.PIPELINE)
    assert first == ("first", f"{CONFIGS}/synthetic_pretrain.yaml", [])
    assert sorted(opts) == sorted(listed_stages(cfg.PIPELINE)[1][2])
    place = opts.index("MODEL.LOCALIZER.NUM_CLUSTERS")
    assert opts[place + 1] == "8" and len(opts) == 6


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["PIPELINE.STAGES", "[]"], "no pipeline"),
        (["PIPELINE.STAGES", "('a', 'b')"], "names 2 PIPELINE.STAGES and 0 PIPELINE.CONFIGS"),
        (["PIPELINE.CONFIGS", "('a.yaml',)"], "leave out PIPELINE.CONFIGS"),
        (["PIPELINE.STAGES", "[{'NAME': 'a'}]"], "a mapping of NAME, CONFIG"),
        (["PIPELINE.STAGES", "['a', {'NAME': 'b', 'CONFIG': 'c'}]"], "OPTIONS, not a"),
        (["PIPELINE.STAGES", "[{'NAME': 'a', 'CONFIG': 'b', 'OPTS': {}}]"], "not .*OPTS"),
        (
            ["PIPELINE.STAGES", "[{'NAME': 'a', 'CONFIG': 'b'}, {'NAME': 'a', 'CONFIG': 'c'}]"],
            "two stages of one NAME",
        ),
    ],
)
def test_what_is_no_list_of_stages(opts, message, tmp_path):
    config = _written(tmp_path / "a.yaml", MAPPINGS)
    with pytest.raises(ValueError, match=message):
        make_stages(config, ["OUTPUT_DIR", str(tmp_path), *opts])
