# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Tests of the clusters.json that a pipeline leaves.
"""

import os
from pathlib import Path

import pytest
import torch
from pipeline_stages import ROUNDS, TABLE, evaluate, stages_of, train

from avdet2.engine.cluster_naming import names_of_stage, write_cluster_file
from avdet2.engine.stages.self_box_detector import SelfBoxDetectorStage
from avdet2.evaluation.naming.cluster_file import ClusterFile
from avdet2.evaluation.naming.cluster_matching import ClusterMatching
from avdet2.evaluation.naming.cluster_names import ClusterNames
from avdet2.evaluation.naming.votes import ClusterVotes

# The clusters of seven clips, of which some have a label.
CLUSTERS = [0, 0, 0, 1, 1, 3, 3]
LABELS = [1, 1, None, 0, 0, None, None]
MATCHING = ClusterMatching(
    [-1, 0, 1, -1], [[0, 0], [3, 0], [0, 2], [0, 0]], "hungarian", ["a", "b"]
)


@pytest.fixture
def stages(tmp_path, monkeypatch):
    """
    All stages with self-labels, trained; localizers of four clusters say CLUSTERS of the clips.
    """
    stages = stages_of(tmp_path, "MODEL.LOCALIZER.NUM_CLUSTERS", "4", config=TABLE)
    for name in ("localizer_joint", "detector", "detector_weak"):
        train(stages[name])

    def class_names(kind, model):
        logits = torch.eye(4)[CLUSTERS]
        votes = ClusterVotes(torch.arange(len(CLUSTERS)), logits, logits)
        names = ClusterNames(kind.cfg, "clusters", lambda _: votes)
        clips = [{"label": label} if label is not None else {} for label in LABELS]
        names.training = clips, ["cat", "dog"]
        return names

    monkeypatch.setattr(SelfBoxDetectorStage, "class_names", class_names)
    return stages


def write(stages, folder):
    return write_cluster_file(list(stages.values()), str(folder))


def keep_matching(stage):
    evaluate(stage)
    MATCHING.to_json(Path(stage.folder) / "inference" / "cluster_matching.json")


def test_names_come_from_the_evaluation(stages, tmp_path):
    keep_matching(stages["detector"])
    path = write(stages, tmp_path)
    assert path == str(tmp_path / "clusters.json")
    named = ClusterFile.read(path, 4)
    assert named.names == ["cluster_000", "a", "b", "cluster_003"]
    assert [cluster.clips for cluster in named.clusters] == [3, 2, 0, 2]
    # detector_weak comes after it, but its classes are labels.
    assert (named.detector, named.localizer) == ("detector", "localizer_joint")


def test_names_come_from_labels_where_there_is_no_test_set(stages, tmp_path):
    named = ClusterFile.read(write(stages, tmp_path))
    assert named.names == ["dog", "cat", "cluster_002", "cluster_003"]


def test_clips_that_cannot_be_read_cost_no_names(stages, tmp_path, monkeypatch, caplog):
    def class_names(kind, model):
        def vote(clips):
            raise ValueError("no training clip could be read")

        names = ClusterNames(kind.cfg, "clusters", vote)
        names.training = [{}], []
        return names

    monkeypatch.setattr(SelfBoxDetectorStage, "class_names", class_names)
    named = ClusterFile.read(write(stages, tmp_path))
    assert named == ClusterFile(ClusterFile.numbered(4).clusters, "detector", "localizer_joint")
    assert "not counted: no training clip could be read" in caplog.text


def test_nothing_is_written_without_a_detector(tmp_path):
    assert write(stages_of(tmp_path / "run", config=TABLE), tmp_path) is None
    assert list(tmp_path.glob("clusters.json")) == []


def test_the_last_round_is_the_detector(stages, tmp_path):
    assert ClusterFile.read(write(stages, tmp_path)).detector == "detector"
    rounds = stages_of(tmp_path, "MODEL.LOCALIZER.NUM_CLUSTERS", "4", config=ROUNDS)
    train(rounds["detector_round2"])
    assert ClusterFile.read(write(rounds, tmp_path)).detector == "detector_round2"


def test_an_edited_file_stays(stages, tmp_path, caplog):
    path = Path(write(stages, tmp_path))
    # Nobody has changed it: later names take its place.
    keep_matching(stages["detector"])
    write(stages, tmp_path)
    path.write_text(path.read_text().replace('"cluster_003", "keep": true', '"cow", "keep": false'))
    edited = path.read_text()
    caplog.set_level("INFO")
    write(stages, tmp_path)
    assert path.read_text() == edited
    assert "has been edited, and stays as it is" in caplog.text
    assert "is older than" not in caplog.text
    os.utime(path, (1, 1))
    write(stages, tmp_path)
    assert "is older than" in caplog.text
    assert ClusterFile.read(path).names == ["cluster_000", "a", "b", "cow"]


def test_the_names_of_each_stage(stages, tmp_path):
    def names(name):
        return names_of_stage(stages[name].cfg, stages[name].folder)

    assert names("detector") == ClusterFile.numbered(4)
    keep_matching(stages["detector"])
    assert names("detector").names == ["cluster_000", "a", "b", "cluster_003"]
    write(stages, tmp_path)
    for name in ("detector", "localizer_joint"):
        assert names(name).clusters[3].clips == 2
    assert names("detector_warmup").names == ["object"]
    # Their classes are labels.
    keep_matching(stages["detector_weak"])
    assert names("detector_weak").clusters[3].clips is None
    # Another localizer's clusters.
    moved = (tmp_path / "clusters.json").read_text().replace("localizer_joint", "localizer_other")
    (tmp_path / "clusters.json").write_text(moved)
    assert names("localizer_joint") == ClusterFile.numbered(4)


def test_a_file_of_other_clusters_is_an_error(stages, tmp_path):
    ClusterFile.numbered(3).write(tmp_path / "clusters.json")
    with pytest.raises(ValueError, match="names 3 clusters, but there are 4"):
        names_of_stage(stages["detector"].cfg, stages["detector"].folder)
