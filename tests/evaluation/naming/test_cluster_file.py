# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Tests of the names that a person gives to clusters.
"""

import json

import numpy as np
import pytest
import torch

from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, Instances
from detectron2.utils.visualizer import Visualizer

from avdet2.engine import load_cfg
from avdet2.evaluation.detection.evaluator import map_clusters
from avdet2.evaluation.naming.cluster_file import ClusterFile, NamedCluster
from avdet2.evaluation.naming.cluster_names import ClusterNames

FOUR = ClusterFile(
    (
        NamedCluster("dog", True, 5),
        NamedCluster("horn", False, 1),
        NamedCluster("cat"),
        NamedCluster("dog"),
    ),
    "detector",
    "localizer_joint",
)


def found(boxes, scores, clusters):
    instances = Instances((100, 100))
    instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.scores, instances.pred_classes = torch.tensor(scores), torch.tensor(clusters)
    return instances


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "clusters.json"
    FOUR.write(path)
    assert ClusterFile.read(path, 4) == FOUR
    # A line for each cluster, for those who edit it.
    assert '{"id": 0, "name": "dog", "keep": true, "clips": 5},' in path.read_text().splitlines()


def test_a_name_in_any_script_is_kept(tmp_path):
    path = tmp_path / "clusters.json"
    ClusterFile.of_names(["Hündin", "三味線"]).write(path)
    assert "三味線" in path.read_text(encoding="utf-8")
    assert ClusterFile.read(path).names == ["Hündin", "三味線"]


def test_keep_and_clips_may_be_left_out():
    parsed = ClusterFile.parse({"clusters": [{"id": 1, "name": "b"}, {"id": 0, "name": " a "}]})
    assert parsed == ClusterFile((NamedCluster("a"), NamedCluster("b")))


def test_an_edited_file_is_known(tmp_path):
    path = tmp_path / "clusters.json"
    FOUR.write(path, as_written=True)
    assert not ClusterFile.is_edited(path)
    # Spaces are no edit.
    path.write_text(json.dumps(json.loads(path.read_text())))
    assert not ClusterFile.is_edited(path)
    path.write_text(path.read_text().replace('"cat"', '"kitten"'))
    assert ClusterFile.is_edited(path)
    for text in ("{", "[]", "{}", "3"):
        path.write_text(text)
        assert ClusterFile.is_edited(path)


WRONG = {
    "no json": ("{'a': 1}", "Expecting property name"),
    "no clusters": ('{"names": []}', "it must be"),
    "a list": ("[1]", "it must be"),
    "empty": ('{"clusters": []}', "it must be"),
    "an entry of text": ('{"clusters": ["dog"]}', 'entry 1, "dog": a cluster has'),
    "no name": ('{"clusters": [{"id": 0}]}', 'entry 1, {"id": 0}: a cluster has an "id"'),
    "misspelt": (
        '{"clusters": [{"id": 0, "name": "a", "kep": true}]}',
        'entry 1.*"kep" is unknown',
    ),
    "id of text": ('{"clusters": [{"id": "0", "name": "a"}]}', "entry 1.*the id must be a number"),
    "id true": ('{"clusters": [{"id": true, "name": "a"}]}', "entry 1.*the id must be a number"),
    "no text": ('{"clusters": [{"id": 0, "name": "  "}]}', "entry 1.*a text that is not empty"),
    "keep of text": (
        '{"clusters": [{"id": 0, "name": "a", "keep": "no"}]}',
        "entry 1.*true or fals",
    ),
    "clips": ('{"clusters": [{"id": 0, "name": "a", "clips": -1}]}', "entry 1.*clips must be"),
    "twice": (
        '{"clusters": [{"id": 0, "name": "a"}, {"id": 0, "name": "b"}]}',
        "entry 2: the id 0 was there before",
    ),
    "a gap": (
        '{"clusters": [{"id": 0, "name": "a"}, {"id": 2, "name": "b"}]}',
        "no entry has the id 1, but one has 2",
    ),
    "all dropped": ('{"clusters": [{"id": 0, "name": "a", "keep": false}]}', "no cluster is kept"),
}


@pytest.mark.parametrize(("text", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_file_gets_one_clear_error(tmp_path, text, message):
    path = tmp_path / "clusters.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"clusters\.json does not name clusters: .*{message}"):
        ClusterFile.read(path)


def test_a_file_of_another_run_is_an_error(tmp_path):
    FOUR.write(tmp_path / "clusters.json")
    with pytest.raises(ValueError, match="names 4 clusters, but there are 8"):
        ClusterFile.read(tmp_path / "clusters.json", 8)
    with pytest.raises(ValueError, match="No such file"):
        ClusterFile.read(tmp_path / "none.json")


def test_clusters_of_one_name_are_one_class():
    assert FOUR.mapping.tolist() == [0, -1, 2, 0]
    assert FOUR.classes == {0: "dog", 2: "cat"}
    # A dropped cluster stands for nobody, though the name comes back.
    parts = (NamedCluster("a", False), NamedCluster("a"), NamedCluster("a"))
    assert ClusterFile(parts).mapping.tolist() == [-1, 1, 1]


def test_merged_detections_compete():
    box, near, far = [10, 10, 50, 50], [11, 10, 51, 50], [60, 60, 90, 90]
    boxes = [near, box, far, box, box]
    raw = found(boxes, [0.5, 0.9, 0.8, 0.7, 0.6], [0, 3, 0, 1, 2])
    shown = FOUR.apply(raw)
    # The dog of cluster 0 loses against that of cluster 3; the horn is dropped; a cat is no dog.
    assert shown.scores.tolist() == pytest.approx([0.9, 0.8, 0.6])
    assert shown.pred_classes.tolist() == [0, 0, 2]
    assert shown.pred_clusters.tolist() == [3, 0, 2]
    # The detector's own output is as it was.
    assert raw.pred_classes.tolist() == [0, 3, 0, 1, 2] and not raw.has("pred_clusters")


def test_boxes_of_one_cluster_have_competed_already():
    names = ClusterFile.of_names(["a", "b"])
    raw = found([[10, 10, 50, 50], [11, 10, 51, 50]], [0.9, 0.8], [1, 1])
    assert len(names.apply(raw)) == 2
    assert len(names.apply(raw[:0])) == 0
    with pytest.raises(ValueError, match="cluster 2 was found, but 2 have names"):
        names.apply(found([[0, 0, 9, 9]], [0.9], [2]))


def test_it_agrees_with_the_evaluation():
    generator = np.random.default_rng(0)
    corners = generator.uniform(0, 60, (200, 2))
    boxes = np.hstack([corners, corners + generator.uniform(20, 40, (200, 2))]).round(1)
    scores, clusters = generator.permutation(200) / 200, generator.integers(0, 4, 200)
    shown = FOUR.apply(found(boxes.tolist(), scores.tolist(), clusters.tolist()))
    results = [
        {"image_id": 1, "category_id": int(k), "bbox": [*b[:2], *(b[2:] - b[:2])], "score": s}
        for k, b, s in zip(clusters, boxes, scores)
    ]
    # Classes: dog, cat.
    kept = map_clusters(results, FOUR.matching().mapping)
    assert [x["score"] for x in kept] == pytest.approx(shown.scores.tolist())
    assert [{0: 0, 1: 2}[x["category_id"]] for x in kept] == shown.pred_classes.tolist()
    assert 0 < len(kept) < 200


def test_an_evaluation_takes_the_names(tmp_path):
    FOUR.write(tmp_path / "clusters.json")
    words = ["TEST.MATCHING.METHOD", "file", "TEST.MATCHING.FILE", str(tmp_path / "clusters.json")]
    matching = ClusterNames(load_cfg("", words), "clusters").for_test_set("any")
    assert matching.class_names == ["dog", "cat"]
    assert matching.mapping.tolist() == [0, -1, 1, 0]
    # A test set without cats.
    assert matching.aligned(["horn", "dog"]).mapping.tolist() == [1, -1, -1, 1]
    (tmp_path / "names.json").write_text((tmp_path / "clusters.json").read_text())
    words[-1] = str(tmp_path / "names.json")
    assert ClusterNames(load_cfg("", words), "clusters").for_test_set("any").num_clusters == 4
    (tmp_path / "names.json").write_text("3")
    with pytest.raises(ValueError, match="is not a cluster matching"):
        ClusterNames(load_cfg("", words), "clusters")


def test_detectron2_draws_the_right_names():
    metadata = FOUR.metadata("names of a test")
    assert MetadataCatalog.get("names of a test") is metadata
    shown = FOUR.apply(found([[20, 30, 190, 190], [210, 220, 390, 380]], [0.9, 0.8], [2, 3]))
    drawn = Visualizer(np.zeros((400, 400, 3), np.uint8), metadata).draw_instance_predictions(shown)
    # Each at the corner of its box.
    texts = {text.get_text(): text.get_position() for text in drawn.ax.texts}
    assert texts == {"cat 90%": (20, 30), "dog 80%": (210, 220)}
    # One colour for one name.
    colors = metadata.thing_colors
    assert colors[0] == colors[3] != colors[2]
    # Another file of the same run takes its place.
    renamed = ClusterFile.of_names(["a", "b"]).metadata("names of a test")
    assert MetadataCatalog.get("names of a test").thing_classes == renamed.thing_classes
    MetadataCatalog.pop("names of a test")
