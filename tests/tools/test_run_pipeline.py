# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Tests of tools/run_pipeline.py: its table, its lock, and how it ends.
"""

import json
import os
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from pipeline_stages import train
from report_page import write_metrics
from tool_modules import load_tool

from avdet2.engine.environment import TORCHRUN
from avdet2.engine.pipeline import Stage, make_stages

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "run_pipeline.py"
PIPELINE = str(ROOT / "configs" / "pipeline_K39.yaml")
SYNTHETIC = str(ROOT / "configs" / "quick_schedules" / "synthetic_pipeline.yaml")
METRICS = '{"iteration": 19, "nce/accuracy": %s}\n'


@pytest.fixture(scope="module")
def tool():
    return load_tool("run_pipeline")


def write_results(stage, results):
    path = Path(stage.folder) / "inference" / "results.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(results))


def test_one_row_for_each_stage(tool, tmp_path):
    stages = make_stages(PIPELINE, ["OUTPUT_DIR", str(tmp_path), "DATASETS.TEST", "('a',)"])
    assert tool.write_table(stages, str(tmp_path)) == ""
    assert not (tmp_path / "table.md").exists()
    write_results(stages[1], {"bbox": {"AP50": 12.3}})
    write_results(stages[3], {"bbox": {"AP50": 45.6}})
    lines = tool.write_table(stages, str(tmp_path)).splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == [
        "| localizer_joint (self-boxes)",
        "| detector",
    ]
    assert " 12.3 " in lines[0] and " 45.6 " in lines[1]
    assert json.loads((tmp_path / "results.json").read_text())["detector"]["bbox"]["AP50"] == 45.6


def test_what_is_said_of_stages_is_written(tool, tmp_path):
    stages = make_stages(PIPELINE, ["OUTPUT_DIR", str(tmp_path), "DATASETS.TEST", "('a',)"])
    said = {"stage": "localizer_joint", "learned": True, "text": "It learned", "todo": ["More"]}
    said |= {"numbers": {"accuracy": 0.5, "left_plateau": None}}
    folder = Path(stages[1].folder)
    folder.mkdir(parents=True)
    (folder / "verdict.json").write_text(json.dumps(said))
    assert tool.write_table(stages, str(tmp_path)) == ""
    assert (tmp_path / "table.md").read_text() == "* It learned. To change: More\n"
    results = json.loads((tmp_path / "results.json").read_text())
    numbers = {"accuracy": 0.5, "left_plateau": None, "verdict": "It learned. To change: More"}
    assert results == {"localizer_joint (self-boxes)": {"training": numbers}}


def test_simclr_has_no_row(tool, tmp_path):
    config = PIPELINE.replace("K39", "K39_simclr")
    stages = make_stages(config, ["OUTPUT_DIR", str(tmp_path), "DATASETS.TEST", "('a','b')"])
    for stage in stages:
        if stage.kind.is_evaluated:
            write_results(stage, {name: {"bbox": {"AP50": 1.0}} for name in "ab"})
    lines = tool.write_table(stages, str(tmp_path)).splitlines()[2:]
    assert len(lines) == 8
    assert not any("simclr" in line for line in lines)


def test_one_row_for_each_test_set(tool, tmp_path):
    stages = make_stages(PIPELINE, ["OUTPUT_DIR", str(tmp_path), "DATASETS.TEST", "('a','b')"])
    write_results(stages[3], {"a": {"bbox": {"AP50": 12.3}}, "b": {"bbox": {"AP50": 45.6}}})
    lines = tool.write_table(stages, str(tmp_path)).splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| detector, a", "| detector, b"]
    assert " 12.3 " in lines[0] and " 45.6 " in lines[1]


def test_a_folder_is_for_one_pipeline_at_a_time(tool, tmp_path):
    with tool.lock_folder(str(tmp_path)):
        with pytest.raises(ValueError, match="is in use"):
            tool.lock_folder(str(tmp_path), seconds=0.3)
        # Each machine of a distributed run has its own.
        tool.lock_folder(str(tmp_path), rank=1).close()
    tool.lock_folder(str(tmp_path), seconds=0).close()


class FakeStage:
    """
    A stage that runs a line of Python.
    """

    name, config_file, folder = "fake", "fake.yaml", "folder"
    kind = verdict = None

    def __init__(self, line: str, done: bool = False) -> None:
        self.line, self.done = line, done

    def is_done(self) -> bool:
        return self.done

    def is_settled(self) -> bool:
        return False

    def command(self, train_net: str, args: Namespace) -> list[str]:
        return [sys.executable, "-c", self.line]


def test_the_first_failure_is_the_last_stage(tool, tmp_path):
    stages = [
        FakeStage("raise SystemExit(9)", done=True),
        FakeStage("pass"),
        FakeStage("raise SystemExit(3)"),
        FakeStage(f"open({str(tmp_path / 'ran')!r}, 'w')"),
    ]
    with tool.lock_folder(str(tmp_path)) as lock, pytest.raises(SystemExit) as error:
        tool.run_stages(stages, Namespace(), lock)
    assert error.value.code == 3
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("accuracy", "opts", "ends"),
    [(1 / 16, {}, True), (1 / 16, {"stop_at_chance": False}, False), (0.5, {}, False)],
)
def test_no_detector_learns_from_a_localizer_that_guesses(
    tool, tmp_path, monkeypatch, caplog, accuracy, opts, ends
):
    words = ["OUTPUT_DIR", str(tmp_path), "DATASETS.TEST", "()"]
    stages = make_stages(SYNTHETIC, words)[1:]
    pretrain, joint, warmup, detector = stages
    train(pretrain)
    # It runs now: it is judged by what it wrote.
    write_metrics(Path(pretrain.folder), [{"iteration": 0, "nce/accuracy": 0.5}])
    joint_code = f"open({joint.folder!r} + '/metrics.json', 'w').write({METRICS % accuracy!r})"
    Path(joint.folder).mkdir()
    codes = {joint: joint_code}
    for stage in (warmup, detector):
        codes[stage] = f"open({str(tmp_path / stage.name)!r} + '.ran', 'w')"
    monkeypatch.setattr(Stage, "command", lambda self, *_: [sys.executable, "-c", codes[self]])
    with tool.lock_folder(str(tmp_path)) as lock:
        assert tool.run_stages(stages, Namespace(), lock, **opts) != ends
    ran = {path.stem for path in tmp_path.glob("*.ran")}
    assert ran == (set() if ends else {warmup.name, detector.name})
    text = "localizer_joint picks the right sound for 6% of the frames (chance: 6%): it did NOT"
    # At the end of its stage, and again where it ends the pipeline.
    assert caplog.text.count(text) == (accuracy < 0.5) + ends
    assert ("detector_warmup does not start" in caplog.text) == ends
    assert ("PIPELINE.STOP_AT_CHANCE False" in caplog.text) == ends


def test_the_time_is_told_ever_more_rarely(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "TELL_SECONDS", (0.1, 0.4))
    told, end = [], tmp_path / "end"

    def tell(elapsed: float) -> None:
        told.append(elapsed)
        if len(told) == 4:
            end.touch()

    code = f"import os, time\nwhile not os.path.exists({str(end)!r}): time.sleep(0.01)\nexit(3)"
    with tool.lock_folder(str(tmp_path)) as lock:
        assert tool._run([sys.executable, "-c", code], dict(os.environ), lock, tell) == 3
    pauses = [b - a for a, b in zip([0.0, *told], told)]
    assert all(pause >= least for pause, least in zip(pauses, (0.1, 0.19, 0.39, 0.39)))


# The tool with a stage that tells its process id and sleeps.
SLEEPER = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("run_pipeline", sys.argv[1])
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)
tool.Stage.check = lambda *args: None
code = "import os, signal, time; signal.signal(signal.SIGINT, signal.SIG_DFL);"
code += "print(os.getpid(), flush=True); time.sleep(300)"
tool.Stage.command = lambda *args: [sys.executable, "-c", code]
tool.main(tool.default_argument_parser().parse_args(sys.argv[2:]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_stage_ends_with_its_pipeline(tool, tmp_path, number):
    words = [sys.executable, "-c", SLEEPER, str(TOOL), "--config-file", PIPELINE]
    words += ["OUTPUT_DIR", str(tmp_path)]
    # The tool's logger writes to stdout too.
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT) as pipeline:
        stage = next(int(line) for line in pipeline.stdout if line.strip().isdigit())
        pipeline.send_signal(number)
        if number == signal.SIGKILL:
            # Nothing can end the stage then, but it keeps a second pipeline out.
            assert pipeline.wait(timeout=60) == -number
            with pytest.raises(ValueError, match="is in use"):
                tool.lock_folder(str(tmp_path), seconds=0)
            os.kill(stage, signal.SIGKILL)
        else:
            assert pipeline.wait(timeout=60) == 128 + number
            with pytest.raises(ProcessLookupError):
                os.kill(stage, 0)
    tool.lock_folder(str(tmp_path), seconds=5).close()


# A stage that writes its variables to the file that is named for its number.
WRITER = "import json, os; json.dump(dict(os.environ), open({!r}, 'w'))"


def test_stages_of_several_processes_meet_at_ports_of_their_own(tool, tmp_path, monkeypatch):
    given = dict(zip(TORCHRUN, ["1", "2", "1", "2", "host", "29500"]))
    paths = [tmp_path / str(i) for i in range(3)]
    stages = [FakeStage(WRITER.format(str(path)), done=i == 1) for i, path in enumerate(paths)]
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with tool.lock_folder(str(tmp_path), rank=1) as lock:
        tool.run_stages(stages, Namespace(), lock, given)
    first, last = (json.loads(paths[i].read_text()) for i in (0, 2))
    # Whether a stage was done already changes no port: another process may find it so later.
    assert (first["MASTER_PORT"], last["MASTER_PORT"]) == ("29501", "29503")
    for found in (first, last):
        assert found["TORCHELASTIC_USE_AGENT_STORE"] == "False"
        assert all(found[name] == given[name] for name in TORCHRUN if name != "MASTER_PORT")


def test_stages_on_two_machines_meet_at_ports_of_their_own(tool, tmp_path):
    words = "--num-gpus 8 --num-machines 2 --machine-rank 1 --dist-url tcp://host:29500"
    args = tool.default_argument_parser().parse_args(words.split())
    stages = make_stages(PIPELINE, ["OUTPUT_DIR", str(tmp_path)])
    commands = [stage.command("train_net.py", args) for stage in stages]
    urls = [command[command.index("--dist-url") + 1] for command in commands]
    assert urls == [f"tcp://host:{port}" for port in (29500, 29501, 29502, 29503)]
    flags = commands[1][commands[1].index("--num-gpus") :]
    assert flags[:6] == words.split()[:6]


# The tool on process 1 of 2, without its stages.
OTHER = (
    SLEEPER[: SLEEPER.index("code =")]
    + """
tool.run_stages = lambda *args: print(args[3]["RANK"]) or True
tool.main(tool.default_argument_parser().parse_args(sys.argv[2:]))
"""
)


def test_only_the_first_process_writes_the_table(tmp_path):
    (tmp_path / "pipeline-0.lock").touch()
    words = [sys.executable, "-c", OTHER, str(TOOL), "--config-file", PIPELINE]
    words += ["OUTPUT_DIR", str(tmp_path)]
    place = dict(zip(TORCHRUN, ["1", "2", "1", "2", "host", "29500"]))
    env = {**os.environ, **place}
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=env)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"pipeline-0.lock", "pipeline-1.lock", "pipeline.txt.rank1"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--num-machines 2", "--dist-url .* is not where processes meet"),
        ("--num-machines 2 --dist-url auto", "--dist-url .* is not where processes meet"),
        ("--num-gpus 0", "at least 1"),
    ],
)
def test_flags_are_checked_before_the_first_stage(tool, tmp_path, words, message):
    words = [*words.split(), "--config-file", PIPELINE, "OUTPUT_DIR", str(tmp_path / "run")]
    with pytest.raises(ValueError, match=message):
        tool.main(tool.default_argument_parser().parse_args(words))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_all_stages_by_torchrun(tiny_datasets, tmp_path):
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(TOOL)]
    config = ROOT / "configs" / "quick_schedules" / "synthetic_pipeline.yaml"
    words += ["--config-file", str(config), "OUTPUT_DIR", str(tmp_path)]
    words += ["DISTRIBUTED.TIMEOUT", "120", "SOLVER.WARMUP_ITERS", "1"]
    words += ["PIPELINE.STOP_AT_CHANCE", "False"]
    words += ["DATALOADER.NUM_WORKERS", "1", "MODEL.LOCALIZER.NUM_CLUSTERS", "2"]
    for stage in ("localizer_pretrain", "localizer_joint"):
        words += [f"{stage}:SOLVER.MAX_EPOCH", "0.0", f"{stage}:SOLVER.MAX_ITER", "2"]
    for stage in ("detector_warmup", "detector"):
        words += [f"{stage}:SOLVER.MAX_ITER", "2", f"{stage}:SOLVER.IMS_PER_BATCH", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DETECTRON2_DATASETS": str(tiny_datasets)}
    for done_before in (0, 5):
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=env)
        assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        for log in ("pipeline.txt", "pipeline.txt.rank1"):
            assert (tmp_path / log).read_text().count("is done") == done_before
        # Once, and not by each process.
        table = (tmp_path / "table.md").read_text().partition("\n\n")[0]
        assert done.stdout.count(table) == 1
    assert "World size: 2" in (tmp_path / "detector" / "log.txt.rank1").read_text()


def test_what_the_help_tells(tool) -> None:
    text = tool.argument_parser().format_help()
    assert all(word in text for word in ("PIPELINE.STAGES", "STAGE:KEY", "PIPELINE.ONLY"))
    assert "\n  --resume" not in text and "\n  --eval-only" not in text


@pytest.mark.parametrize("flag", ["--resume", "--eval-only"])
def test_flags_that_say_nothing_to_a_pipeline(flag):
    words = [sys.executable, str(TOOL), "--config-file", PIPELINE, flag]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert "goes on where it stopped" in done.stderr
