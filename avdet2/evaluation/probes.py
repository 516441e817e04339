# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
What frozen features are worth: nearest neighbours and a linear classifier on them.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from detectron2.modeling import Backbone

# The linear probe's candidates for the inverse strength of the L2 penalty.
PENALTIES = (0.001, 0.01, 0.1, 1.0, 10.0)


def probe_features(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    groups: Sequence[str],
    k: int = 20,
) -> dict[str, float]:
    """
    Both probes, and what guessing gives.

    Args:
        train, test: features (n, D) and labels (n,), integers.
        groups: name of the video of each training sample.
        k: number of neighbours.

    Returns:
        dict: ``knn`` and ``linear`` (accuracies), ``chance`` (that of the most frequent training
        class), all as fractions, and ``C`` of the linear probe.

    Raises:
        ValueError: fewer than ``k`` training samples, one class only, or nothing to test on.
    """
    (_, labels), (_, truth) = train, test
    if not len(truth):
        raise ValueError(
            "there is no clip to test on: every class has one video only; give more, or a test set"
        )
    if len(np.unique(labels)) < 2:
        raise ValueError(f"all {len(labels)} training clips have one label: nothing to tell apart")
    knn = knn_accuracy(train, test, k)
    linear, penalty = linear_accuracy(train, test, groups)
    chance = float((truth == np.bincount(labels).argmax()).mean())
    return {"chance": chance, "knn": knn, "linear": linear, "C": penalty}


def knn_accuracy(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """
    Share of test samples that their nearest training samples name correctly.

    The k neighbours of the greatest cosine vote with weight exp(cosine / temperature), as in
    instance discrimination (Wu et al., 2018) and since.

    Args:
        train, test: features (n, D) and labels (n,), integers.
        k, temperature: of the vote.

    Raises:
        ValueError: fewer than ``k`` training samples.
    """
    if len(train[1]) < k:
        raise ValueError(
            f"{k} neighbours are asked of {len(train[1])} training clips: take a smaller k"
        )
    # Training workers import this package without scikit-learn.
    from sklearn.neighbors import KNeighborsClassifier

    knn = KNeighborsClassifier(
        k,
        metric="cosine",
        algorithm="brute",
        # A distance is 1 - cosine.
        weights=lambda distances: np.exp((1 - distances) / temperature),
    )
    return float(knn.fit(*train).score(*test))


def linear_accuracy(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    groups: Sequence[str],
) -> tuple[float, float]:
    """
    Accuracy of a logistic regression on standardised features.

    Its penalty is chosen on a quarter of the training videos; then it is trained on all of them.

    Args:
        train, test: features (n, D) and labels (n,), integers.
        groups: name of the video of each training sample.

    Returns:
        tuple: the accuracy, a fraction, and scikit-learn's C.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, PredefinedSplit
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    held_out = split_by_hash(groups, train[1], salt="penalty")
    # Of equals the first, which is the strongest penalty.
    penalties = {"logisticregression__C": PENALTIES}
    if held_out.any():
        split = PredefinedSplit(np.where(held_out, 0, -1))
        classifier = GridSearchCV(classifier, penalties, cv=split, error_score="raise")
    accuracy = float(classifier.fit(*train).score(*test))
    # Without a held-out video, as no class has two, it is scikit-learn's own.
    chosen = getattr(classifier, "best_params_", {"logisticregression__C": 1.0})
    return accuracy, chosen["logisticregression__C"]


def split_by_hash(
    groups: Sequence[str], labels: Sequence[int], share: float = 0.25, salt: str = "test"
) -> np.ndarray:
    """
    Hold out a share of each class, always the same one, without a video on both sides.

    Args:
        groups: name of each sample's video: its file name, without the folder, decides.
        labels: of the samples; a video's first one counts.
        share: of the videos of a class, at least one of them where there are two.
        salt: another one gives another split.

    Returns:
        ndarray: of bool, True for what is held out.
    """
    videos: dict[int, list[str]] = defaultdict(list)
    for group, label in dict(zip(reversed(groups), reversed(list(labels)))).items():
        videos[int(label)].append(group)
    held_out = set()
    for names in videos.values():
        count = max(1, round(share * len(names))) if len(names) > 1 else 0
        held_out.update(sorted(names, key=lambda name: (_digest(name, salt), name))[:count])
    return np.array([group in held_out for group in groups], dtype=bool)


def _digest(name: str, salt: str) -> str:
    name = name.replace("\\", "/").rpartition("/")[2]
    return hashlib.sha256(f"{salt} {name}".encode("utf-8", "surrogateescape")).hexdigest()


@torch.no_grad()
def pooled_features(
    backbones: Sequence[Backbone],
    feature: str,
    batches: Iterable[list[dict]],
    size: int,
    pixel_stats: tuple[Sequence[float], Sequence[float]],
) -> tuple[np.ndarray, list[np.ndarray]]:
    """
    The spatial means of backbones' maps for the largest central square of every image.

    Args:
        backbones: on one device; are put into eval mode.
        feature: name of the map.
        batches: lists of dicts with "image" (3, h, w) uint8 of any size, and "sample_id".
        size: the squares are resized to so many pixels.
        pixel_stats: mean and standard deviation per channel, of images in 0..255.

    Returns:
        tuple: sample ids (n,), and features (n, C), float32, of each backbone.

    Raises:
        ValueError: no such map, or no image at all.
    """
    for backbone in backbones:
        names = sorted(backbone.output_shape())
        if feature not in names:
            raise ValueError(f"the backbone has no feature {feature!r}, only {', '.join(names)}")
        backbone.eval()
    device = next(backbones[0].parameters()).device
    mean, std = (torch.tensor(x, device=device).view(-1, 1, 1) for x in pixel_stats)
    ids, features = [], [[] for _ in backbones]
    for batch in filter(None, batches):
        squares = torch.stack([_central_square(x["image"].to(device), size) for x in batch])
        images = (squares - mean) / std
        for backbone, parts in zip(backbones, features):
            parts.append(backbone(images)[feature].mean(dim=(2, 3)).cpu().numpy())
        ids += [x["sample_id"] for x in batch]
    if not ids:
        raise ValueError("no clip could be read")
    return np.array(ids), [np.concatenate(parts) for parts in features]


def _central_square(image: torch.Tensor, size: int) -> torch.Tensor:
    square = TF.center_crop(image, [min(image.shape[1:])] * 2)
    return TF.resize(square, [size, size], InterpolationMode.BICUBIC, antialias=True).float()


def probe_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """
    A Markdown table of probes, accuracies in percent.

    Args:
        rows: for each backbone's name what :func:`probe_features` returns, and the numbers of
            clips and classes: ``train``, ``test`` and ``classes``.
    """
    lines = [
        "| backbone | clips | classes | chance | kNN | linear |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in rows.items():
        percent = [f"{100 * row[key]:.1f}" for key in ("chance", "knn", "linear")]
        clips = f"{row['train']} + {row['test']}"
        lines.append(f"| {' | '.join([name, clips, str(row['classes']), *percent])} |")
    return "\n".join(lines) + "\n"
