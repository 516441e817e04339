# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The command `avdet2`.
"""

import sys
from pathlib import Path

import pytest

import avdet2.__main__ as command_line
from avdet2.model_zoo import get_config_file

TOOLS = Path(__file__).resolve().parents[1] / "tools"


def call(monkeypatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["avdet2", *words])
    monkeypatch.setattr(sys, "path", list(sys.path))
    command_line.main()


def test_every_tool_is_a_command(monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, "--help")
    assert ended.value.code == 0
    listed = capsys.readouterr().out
    assert "  train  " in listed and "Trains or evaluates one stage\n" in listed
    for tool in TOOLS.glob("[!_]*.py"):
        name = {"train_net": "train", "run_pipeline": "pipeline"}.get(tool.stem, tool.stem)
        assert (f"\n  {name.replace('_', '-')} " in listed) == (tool.stem != "install_detectron2")


def test_a_command_is_its_tool(monkeypatch, capsys, tmp_path):
    script = "import sys\nif __name__ == '__main__':\n    print(sys.argv[1:], __file__)"
    (tmp_path / "run_pipeline.py").write_text(script)
    (tmp_path / "prepare_clips.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr(command_line, "TOOLS", tmp_path)
    call(monkeypatch, "pipeline", "--num-gpus", "2", "--help", "SEED", "1")
    expected = f"['--num-gpus', '2', '--help', 'SEED', '1'] {tmp_path / 'run_pipeline.py'}\n"
    assert capsys.readouterr().out == expected
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, "prepare-clips")
    assert ended.value.code == 3


@pytest.mark.parametrize("words", [["trian"], []])
def test_an_unknown_command_is_an_error(words, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, *words)
    assert ended.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_configs_that_come_with_avdet2_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = get_config_file("pipeline_K39.yaml")
    for given in (["--config-file", "pipeline_K39.yaml"], ["--config-file=pipeline_K39.yaml"]):
        words = ["--num-gpus", "2", *given, "SEED", "pipeline_K39.yaml"]
        expected = ["--num-gpus", "2", "--config-file", found, "SEED", "pipeline_K39.yaml"]
        assert command_line.with_known_configs(words) == expected
    words = ["--config-file", "configs/AV-Localization/pretrain.yaml"]
    expected = get_config_file("AV-Localization/pretrain.yaml")
    assert command_line.with_known_configs(words)[1] == expected
    # The user's own file goes first, and what is nowhere is left to the tool.
    (tmp_path / "pipeline_K39.yaml").touch()
    for words in (["--config-file", "pipeline_K39.yaml"], ["--config-file", "no.yaml"], []):
        assert command_line.with_known_configs(words) == words
