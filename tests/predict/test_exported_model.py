# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Exported detectors find what the model finds, in pictures of any size.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from detectron2.modeling import build_model

from avdet2.evaluation.naming.cluster_file import ClusterFile, NamedCluster
from avdet2.model_zoo import get_config
from avdet2.predict.exported_model import LOADERS, WRITERS, compare

ROOT = Path(__file__).resolve().parents[2]
OPTS = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.ROI_HEADS.NUM_CLASSES", "3"]
# Whatever it has not learned is found as well.
OPTS += ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.01", "TEST.DETECTIONS_PER_IMAGE", "20"]
SIZES = [(96, 128), (128, 96), (160, 150), (65, 200)]


@pytest.fixture(scope="module")
def cfg():
    return get_config("quick_schedules/own_videos_detector.yaml", OPTS)


@pytest.fixture(scope="module")
def model(cfg):
    torch.manual_seed(3)
    return build_model(cfg).eval()


def pictures(sizes=SIZES) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [
        torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8) for size in sizes
    ]


@pytest.mark.parametrize("name", list(LOADERS))
def test_an_exported_detector_finds_the_same(name, model, tmp_path):
    path = str(tmp_path / "model")
    WRITERS[name](model, pictures()[0], path)
    exported = LOADERS[name](path)
    for size, image in zip(SIZES, pictures()):
        (expected,) = model([{"image": image, "height": size[0], "width": size[1]}])
        expected = expected["instances"]
        boxes, clusters, scores, seen = exported(image)
        assert len(expected) == 20
        torch.testing.assert_close(boxes, expected.pred_boxes.tensor, atol=0.01, rtol=0)
        torch.testing.assert_close(scores, expected.scores, atol=1e-4, rtol=0)
        assert clusters.tolist() == expected.pred_classes.tolist()
        assert seen.tolist() == list(size)
    found = compare(model, exported, pictures())
    assert found.detections == 80
    assert found.boxes < 0.01 and found.scores < 1e-4


def test_a_vit_is_torchscript_only(tmp_path):
    words = ["MODEL.BACKBONE.NAME", "build_timm_fpn_backbone", "MODEL.TIMM.NAME", "test_vit"]
    words += ["MODEL.TIMM.OUT_FEATURES", "('blocks.3',)", "MODEL.FPN.IN_FEATURES", "['blocks.3']"]
    torch.manual_seed(3)
    model = build_model(get_config("quick_schedules/own_videos_detector.yaml", OPTS + words)).eval()
    path = str(tmp_path / "model")
    WRITERS["torchscript"](model, pictures()[0], path)
    assert compare(model, LOADERS["torchscript"](path), pictures()).detections == 80
    with pytest.raises(ValueError, match="cannot be an ONNX file: .*Take --format torchscript"):
        WRITERS["onnx"](model, pictures()[0], path)


@pytest.mark.parametrize("field, change", [(0, 1.0), (1, 1), (2, 0.01)])
def test_what_differs_is_noticed(field, change, model):
    def exported(image):
        found = model.inference([{"image": image}], do_postprocess=False)[0]
        values = [found.pred_boxes.tensor.clone(), found.pred_classes + 0, found.scores + 0]
        values[field][0] += change
        return values

    with pytest.raises(ValueError, match="picture of 96 x 128 the exported model finds other"):
        compare(model, exported, pictures())


def test_the_weights_are_the_model_s(model, tmp_path):
    WRITERS["safetensors"](model, pictures()[0], str(tmp_path / "model.safetensors"))
    weights = load_file(tmp_path / "model.safetensors")
    state = model.state_dict()
    assert weights.keys() == state.keys()
    assert all(torch.equal(weights[name], state[name]) for name in state)


@pytest.mark.slow
def test_the_tool(cfg, model, tmp_path):
    stage = tmp_path / "detector"
    stage.mkdir()
    (stage / "config.yaml").write_text(cfg.dump())
    torch.save({"model": model.state_dict()}, stage / "model_final.pth")
    names = [NamedCluster("dog"), NamedCluster("flute", keep=False), NamedCluster("dog")]
    ClusterFile(tuple(names), "detector").write(tmp_path / "clusters.json")
    words = ["--run", str(tmp_path), "--format", "torchscript", "onnx", "safetensors"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "export_model.py"), *words],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("  80 detections in 4 pictures are the model's") == 2
    files = {path.name for path in (tmp_path / "exported").iterdir()}
    assert files == {"model.json", "model.ts", "model.onnx", "model.safetensors"}
    description = json.loads((tmp_path / "exported" / "model.json").read_text())
    assert [c["name"] for c in description["clusters"] if c["keep"]] == ["dog", "dog"]
    assert description["input"]["short_side"] == 256
