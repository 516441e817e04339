# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
A detector as a file that runs without avdet2 and Detectron2: TorchScript or ONNX, by tracing.

It takes one picture (3, H, W), uint8, channels and size as model.json says, and gives boxes (N, 4),
xyxy in pixels of that picture, clusters (N), scores (N), by falling score, and the picture's size.
"""

import json
import os
import warnings
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import nn

from detectron2.export import TracingAdapter
from detectron2.structures import Instances

from avdet2.predict.predictor import Predictor
from avdet2.utils.files import write_whole

__all__ = ["LOADERS", "WRITERS", "Agreement", "compare", "input_of", "write_description"]

# Of boxes in pixels, and of scores.
BOX_TOLERANCE, SCORE_TOLERANCE = 0.05, 1e-3
OUTPUTS = ["boxes", "clusters", "scores", "image_size"]
# What a file of each format makes of a picture: its OUTPUTS.
Exported = Callable[[torch.Tensor], list[torch.Tensor]]


class Agreement(NamedTuple):
    """
    What a comparison found: number of detections, largest differences of boxes (pixels) and scores.
    """

    detections: int
    boxes: float
    scores: float


def input_of(predict: Predictor, image) -> torch.Tensor:
    """
    What a model takes for a picture (H, W, 3) uint8 BGR: (3, h, w), uint8.
    """
    pixels = image[:, :, ::-1] if predict.input_format == "RGB" else image
    resized = predict.aug.get_transform(pixels).apply_image(pixels)
    return torch.as_tensor(resized.transpose(2, 0, 1).copy())


def find(model: nn.Module, inputs: list[dict]) -> list[dict[str, Instances]]:
    """
    What a detector finds, in pixels of what it takes.
    """
    return [{"instances": model.inference(inputs, do_postprocess=False)[0]}]


def write_torchscript(model: nn.Module, image: torch.Tensor, path: str) -> None:
    """
    Trace a detector.

    Args:
        model: a GeneralizedRCNN; on the device on which the file is to run.
        image: (3, H, W) uint8, any picture.
        path: of the file.
    """
    adapter = TracingAdapter(model.eval(), [{"image": image}], find).eval()
    with warnings.catch_warnings(), torch.no_grad(), write_whole(path) as part:
        # Of shapes that are read as numbers: whether they hold for other sizes is compared.
        warnings.simplefilter("ignore")
        torch.jit.trace(adapter, (image,), check_trace=False).save(str(part))


def write_onnx(model: nn.Module, image: torch.Tensor, path: str) -> None:
    """
    As :func:`write_torchscript`, for ONNX, operators of version 17.

    Raises:
        ValueError: ONNX has no operator for a part of the model.
    """
    adapter = TracingAdapter(model.eval(), [{"image": image}], find).eval()
    axes = {name: {0: "number"} for name in OUTPUTS[:3]} | {"image": {1: "height", 2: "width"}}
    with warnings.catch_warnings(), torch.no_grad(), write_whole(path) as part:
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(
                adapter,
                (image,),
                str(part),
                # torchvision's operators are known to this exporter.
                dynamo=False,
                opset_version=17,
                input_names=["image"],
                output_names=OUTPUTS,
                dynamic_axes=axes,
            )
        except torch.onnx.errors.UnsupportedOperatorError as error:
            raise ValueError(
                f"the model cannot be an ONNX file: {str(error).splitlines()[0]} (a ViT resizes "
                "its position embedding so). Take --format torchscript"
            ) from error


def write_safetensors(model: nn.Module, image: torch.Tensor, path: str) -> None:
    """
    The weights alone, under their names in the model. Needs the package safetensors.
    """
    from safetensors.torch import save_model

    with write_whole(path) as part:
        save_model(model, str(part))


def load_torchscript(path: str) -> Exported:
    """
    A file of :func:`write_torchscript`, ready to run.
    """
    model = torch.jit.load(path)
    return lambda image: list(model(image))


def load_onnx(path: str) -> Exported:
    """
    A file of :func:`write_onnx`, run by the package onnxruntime on the CPU.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda image: list(map(torch.as_tensor, session.run(None, {"image": image.numpy()})))


WRITERS = {"torchscript": write_torchscript, "onnx": write_onnx, "safetensors": write_safetensors}
LOADERS = {"torchscript": load_torchscript, "onnx": load_onnx}


def compare(model: nn.Module, exported: Exported, images: Iterable[torch.Tensor]) -> Agreement:
    """
    Compare what a model and its exported file find.

    Args:
        model: what was exported.
        exported: of one of :data:`LOADERS`.
        images: (3, H, W) uint8, of several sizes.

    Raises:
        ValueError: they do not find the same. A detection may only be missing where its score is
            so near to the lowest that rounding decides whether it is found.
    """
    worst = Agreement(0, 0.0, 0.0)
    for image in images:
        with torch.no_grad():
            (found,) = find(model, [{"image": image}])
            ours, theirs = found["instances"].to("cpu"), exported(image)
        boxes, clusters, scores = (value.cpu() for value in theirs[:3])
        # (N, M): of each detection from each other.
        away = (ours.pred_boxes.tensor[:, None] - boxes[None]).abs().amax(2)
        off = (ours.scores[:, None] - scores[None]).abs()
        twins = (away <= BOX_TOLERANCE) & (off <= SCORE_TOLERANCE)
        twins &= ours.pred_classes[:, None] == clusters[None]
        lone = torch.cat([ours.scores[~twins.any(1)], scores[~twins.any(0)]])
        lowest = torch.cat([ours.scores, scores]).min() if len(off) + len(scores) else 0.0
        if (lone > lowest + SCORE_TOLERANCE).any():
            raise ValueError(
                f"for a picture of {image.shape[1]} x {image.shape[2]} the exported model finds "
                f"other things: {len(lone)} of {len(off)} detections have no counterpart"
            )
        pairs = twins.nonzero()
        here = (away[twins].max().item(), off[twins].max().item()) if len(pairs) else (0.0, 0.0)
        number = worst.detections + int(twins.any(1).sum())
        worst = Agreement(number, max(worst.boxes, here[0]), max(worst.scores, here[1]))
    return worst


def write_description(predict: Predictor, path: str | os.PathLike[str]) -> None:
    """
    Write what an exported model takes and gives, and the names of its clusters, as json.
    """
    cfg = predict.cfg
    content = {
        "input": {
            "layout": "(3, height, width), uint8",
            "channels": predict.input_format,
            "short_side": cfg.INPUT.MIN_SIZE_TEST,
            "longest_side": cfg.INPUT.MAX_SIZE_TEST,
        },
        "outputs": OUTPUTS,
        # Clusters of one name are one class.
        "clusters": [
            {"id": k, "name": cluster.name, "keep": cluster.keep}
            for k, cluster in enumerate(predict.clusters.clusters)
        ],
    }
    with write_whole(path) as part:
        part.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
