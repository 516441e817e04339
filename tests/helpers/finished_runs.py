# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The folder of a run whose detector finds a known object, without a training.
"""

from pathlib import Path

import numpy as np
import torch

from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Boxes, Instances

from avdet2.engine import load_cfg
from avdet2.evaluation.naming.cluster_file import ClusterFile, NamedCluster

CONFIG = Path(__file__).resolve().parents[2] / "configs/quick_schedules/synthetic_detector.yaml"
FOUR = (
    NamedCluster("horn", True, 5),
    NamedCluster("cow", False, 1),
    NamedCluster("cat", True, 3),
    NamedCluster("horn", True, 2),
)


@META_ARCH_REGISTRY.register()
class BrightBoxDetector(torch.nn.Module):
    """
    Finds what is brighter than 128: its box, twice, as cluster 3 (score 0.9) and as cluster 0 (a
    pixel larger, 0.6); and the whole picture as cluster 2 (0.2) and as the dropped cluster 1
    (0.95).
    """

    def __init__(self, cfg):
        super().__init__()
        self.least = cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, batch):
        return [{"instances": self.find(inputs)} for inputs in batch]

    def find(self, inputs):
        height, width = inputs["height"], inputs["width"]
        rows, columns = np.nonzero(inputs["image"].numpy().mean(axis=0) > 128)
        scale = [width / inputs["image"].shape[2], height / inputs["image"].shape[1]] * 2
        boxes, scores, clusters = [[0, 0, width, height]] * 2, [0.95, 0.2], [1, 2]
        if len(rows):
            box = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) * scale
            boxes, scores = [*boxes, box, box + [-1, -1, 1, 1]], [*scores, 0.9, 0.6]
            clusters = [*clusters, 3, 0]
        found = Instances((height, width))
        found.pred_boxes = Boxes(torch.as_tensor(np.array(boxes, dtype=np.float32)))
        found.scores, found.pred_classes = torch.tensor(scores), torch.tensor(clusters)
        found = found[found.scores.argsort(descending=True)]
        return found[found.scores > self.least]


def finished_run(folder: Path, clusters=FOUR, *opts: str) -> Path:
    """
    A run of four clusters with such a detector, in a folder.
    """
    stage = folder / "detector"
    stage.mkdir(parents=True)
    words = ["MODEL.META_ARCHITECTURE", "BrightBoxDetector", "MODEL.DEVICE", "cpu"]
    words += ["MODEL.WEIGHTS", "", "MODEL.ROI_HEADS.NUM_CLASSES", str(len(clusters)), *opts]
    cfg = load_cfg(str(CONFIG), words)
    (stage / "config.yaml").write_text(cfg.dump())
    torch.save({"model": {"weight": torch.zeros(1)}}, stage / "model_final.pth")
    (stage / "last_checkpoint").write_text("model_final.pth")
    ClusterFile(tuple(clusters), "detector").write(folder / "clusters.json", as_written=True)
    return folder


def picture_of(box: tuple, height: int = 120, width: int = 160) -> np.ndarray:
    """
    A dark picture (H, W, 3) uint8 with a bright object.
    """
    image = np.full((height, width, 3), 20, np.uint8)
    left, top, right, bottom = box
    image[top:bottom, left:right] = 230
    return image
