# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Pictures: heatmaps with self-boxes, detections with names, training curves.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import cv2
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patheffects import withStroke

from detectron2.utils.visualizer import VisImage, Visualizer

# The least length of a drawn image's short side, in pixels: lines and text on it can be read.
MIN_SIDE = 320
# Colours that stay apart, used in turn for classes; brown and grey are lost on photographs.
PALETTE = [color for i, color in enumerate(plt.get_cmap("tab10").colors) if i not in (5, 7)]


class _ClearVisualizer(Visualizer):
    """
    Boxes that stand out from any background, and texts that do not leave the picture.
    """

    def draw_box(
        self,
        box_coord: np.ndarray,
        alpha: float = 1.0,
        edge_color: str | tuple = "white",
        line_style: str = "-",
    ) -> VisImage:
        output = super().draw_box(box_coord, alpha, edge_color, line_style)
        line = output.ax.patches[-1]
        # Small images are enlarged, which the line need not be.
        line.set_linewidth(line.get_linewidth() / output.scale)
        line.set_path_effects([withStroke(linewidth=line.get_linewidth() + 1, foreground="black")])
        return output

    def draw_truth(self, box: np.ndarray, silent: bool) -> None:
        """
        A thin white box (4,), dashed for an object that is not heard.
        """
        line = self.draw_box(box, line_style="--" if silent else "-").ax.patches[-1]
        line.set_linewidth(1.2)
        line.set_path_effects([withStroke(linewidth=2.2, foreground="black")])

    def draw_text(self, text: str, position: tuple, **style) -> VisImage:
        output = super().draw_text(text, position, **style)
        drawn, to_pixels = output.ax.texts[-1], output.ax.transData
        extent = drawn.get_window_extent(output.canvas.get_renderer())
        limits = np.array([output.width, output.height]) * output.scale - 2
        shift = np.maximum(2 - extent.min, 0) + np.minimum(limits - extent.max, 0)
        drawn.set_position(to_pixels.inverted().transform(to_pixels.transform(position) + shift))
        return output


def draw_boxes(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: Sequence[str] | None,
    classes: Sequence[int],
    truth: np.ndarray | Sequence = (),
    silent: Sequence[bool] = (),
) -> np.ndarray:
    """
    Draw named boxes with Detectron2's Visualizer, one colour per class.

    Args:
        image: (H, W, 3) uint8 RGB.
        boxes: (n, 4), xyxy in pixels of ``image``.
        labels: n texts, or None for boxes without text.
        classes: n indices, which choose the colours.
        truth: (m, 4), boxes of the ground truth, which are thin and white.
        silent: m flags, of ground truth that is dashed.

    Returns:
        ndarray: (H', W', 3) uint8 RGB, enlarged where ``image`` is small.
    """
    visualizer = _ClearVisualizer(image, scale=max(1.0, MIN_SIDE / min(image.shape[:2])))
    for box, is_silent in zip(np.asarray(truth, dtype=np.float64), silent, strict=True):
        visualizer.draw_truth(box, is_silent)
    drawn = visualizer.overlay_instances(
        boxes=np.asarray(boxes, dtype=np.float64).reshape(-1, 4),
        labels=labels,
        assigned_colors=[PALETTE[c % len(PALETTE)] for c in classes],
    )
    return drawn.get_image()


def overlay_heatmap(image: np.ndarray, heatmap: np.ndarray) -> np.ndarray:
    """
    Lay a heatmap over an image, bilinearly enlarged as eq. 5 sees it, and denser where it is high.

    Args:
        image: (H, W, 3) uint8 RGB.
        heatmap: (h, w), of any range; its own minimum and maximum span the colours.

    Returns:
        ndarray: (H, W, 3) uint8 RGB.
    """
    layer = heat_layer(heatmap, image.shape[:2])
    opacity = layer[:, :, 3:] / 255
    return ((1 - opacity) * image + opacity * layer[:, :, :3]).astype(np.uint8)


def heat_layer(heatmap: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """
    What :func:`overlay_heatmap` lays over an image.

    Args:
        heatmap: (h, w), of any range; its own minimum and maximum span the colours.
        size: height and width in pixels.

    Returns:
        ndarray: (H, W, 4) uint8 RGB and opacity.
    """
    heat = cv2.resize(heatmap.astype(np.float32), size[::-1])
    low, high = heat.min(), heat.max()
    # A constant map has no place to show.
    heat = (heat - low) / (high - low) if high > low else np.zeros_like(heat)
    layer = plt.get_cmap("turbo")(heat)
    layer[:, :, 3] = 0.25 + 0.4 * heat
    return (layer * 255).astype(np.uint8)


def save_grid(
    path: str | Path, images: Sequence[np.ndarray], titles: Sequence[str], columns: int = 4
) -> None:
    """
    Write images as one picture, row by row.

    Args:
        path: of the PNG file.
        images: (H, W, 3) uint8 RGB each.
        titles: a text above each image.
        columns: images in a row.
    """
    if not images:
        raise ValueError(f"there is nothing to draw in {path}")
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3 * columns, 3.25 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, title in zip(axes.flat, images, titles, strict=False):
        axis.imshow(image, interpolation="antialiased")
        axis.set_title(title, fontsize=9, pad=4)
    figure.tight_layout(pad=0.6)
    figure.savefig(path, dpi=90, bbox_inches="tight", pad_inches=0.05)
    plt.close(figure)


def read_metrics(path: str | Path) -> list[dict]:
    """
    The rows of Detectron2's metrics.json; a last line cut off by a killed process is left out.
    """
    rows = []
    for line in Path(path).read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def save_curves(path: str | Path, runs: dict[str, list[dict]]) -> None:
    """
    Write the losses, and what else tells of the progress, of several stages as one picture.

    Args:
        path: of the PNG file.
        runs: for each stage the rows of its metrics.json.
    """
    panels = {
        "losses": lambda key: "loss" in key,
        "accuracy and agreement (0..1)": lambda key: (
            key == "fast_rcnn/cls_accuracy"
            or key.endswith("/accuracy")
            or key.startswith(("self_label/nmi", "self_label/assess_"))
        ),
    }
    figure, axes = plt.subplots(
        len(panels), len(runs), figsize=(4.2 * len(runs), 3.2 * len(panels)), squeeze=False
    )
    for column, (stage, rows) in enumerate(runs.items()):
        for axis, (title, wanted) in zip(axes[:, column], panels.items()):
            for key in sorted({key for row in rows for key in row if wanted(key)}):
                points = [(row["iteration"], row[key]) for row in rows if key in row]
                # A line of one point is not seen.
                marker = "o" if len(points) == 1 else None
                axis.plot(*zip(*points), label=key, linewidth=1, marker=marker, markersize=4)
            axis.set_title(f"{stage}: {title}", fontsize=9)
            axis.set_xlabel("iteration", fontsize=8)
            if axis.lines:
                axis.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)
