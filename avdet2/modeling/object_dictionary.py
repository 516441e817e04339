# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
A dictionary of objects, as in "Discriminative Sounding Objects Localization" (DSOL): from one map
of what is heard to one map for each kind of object that is heard.

The visual features of a training clip are averaged where the heatmap is high, K-means of the
averages finds kinds of objects, and the dictionary holds one vector for each of them. In inference
every location is compared with every entry; the product with the heatmap drops silent objects.

What differs from DSOL: features are f^v, which the sound has shaped, in place of the backbone's
(on the synthetic benchmark kinds agree better with classes: NMI .83 against .77); the mask is
eq. 5's in place of a fixed threshold; cosines stand in place of scalar products; and its second
stage, which trains on mixtures by the agreement of both modalities' kinds, is not there.
"""

from pathlib import Path

import torch
import torch.nn.functional as F

from detectron2.utils.file_io import PathManager

from avdet2.checkpoint.reading import load_checkpoint
from avdet2.modeling.self_box import threshold
from avdet2.utils.files import write_whole

# Beta of eq. 5 for the mask: a part of the object will do, but nothing of the background.
MASK_BETA = 0.7
# An object is heard if the peak of its map is at least so much of the highest one.
HEARD_SHARE = 0.5


def object_vectors(features: torch.Tensor, heatmaps: torch.Tensor) -> torch.Tensor:
    """
    Average of the features where the heatmap reaches eq. 5's threshold.

    Args:
        features: of shape (N, D, h, w).
        heatmaps: of shape (N, h, w).

    Returns:
        Tensor: of shape (N, D), unit length.
    """
    cuts = threshold(heatmaps, MASK_BETA)
    # In a constant map, rounding may put the threshold above all cells.
    cuts = torch.minimum(cuts, heatmaps.amax(dim=(1, 2)))
    mask = (heatmaps >= cuts[:, None, None]).to(features)
    return F.normalize(torch.einsum("ndhw,nhw->nd", features, mask), dim=1)


def cluster_objects(vectors: torch.Tensor, num_objects: int, seed: int = 0) -> torch.Tensor:
    """
    The dictionary of objects: centres of K-means.

    Args:
        vectors: of shape (n, D), unit length.
        num_objects: number of entries.
        seed: of K-means.

    Returns:
        Tensor: of shape (num_objects, D), float32, unit length, the largest cluster first.

    Raises:
        ValueError: fewer vectors than entries, or a vector that is not finite.
    """
    # Only needed when a dictionary is built.
    from sklearn.cluster import KMeans

    if not 1 <= num_objects <= len(vectors):
        raise ValueError(f"cannot make {num_objects} objects of {len(vectors)} clips")
    if not vectors.isfinite().all():
        raise ValueError("the localizer's features are not finite: look at its training")
    kmeans = KMeans(num_objects, n_init=10, random_state=seed).fit(vectors.numpy())
    order = torch.bincount(torch.from_numpy(kmeans.labels_), minlength=num_objects).argsort(
        descending=True, stable=True
    )
    return F.normalize(torch.from_numpy(kmeans.cluster_centers_).float()[order], dim=1)


def save_dictionary(objects: torch.Tensor, path: str) -> None:
    """
    Write a dictionary (O, D) for MODEL.LOCALIZER.OBJECT_DICTIONARY.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with write_whole(path) as part:
        torch.save({"objects": objects}, part)


def load_dictionary(path: str, embed_dim: int) -> torch.Tensor:
    """
    Args:
        path: a file that :func:`save_dictionary` wrote; nothing in it is executed.
        embed_dim: of the localizer.

    Returns:
        Tensor: of shape (O, embed_dim).

    Raises:
        ValueError: the file is missing, or was made with another localizer.
    """
    if not PathManager.isfile(path):
        raise ValueError(
            f"MODEL.LOCALIZER.OBJECT_DICTIONARY {path!r} is not a file: write it with "
            "tools/build_object_dictionary.py"
        )
    objects = load_checkpoint(path, mapped=False).get("objects")
    if not isinstance(objects, torch.Tensor) or objects.ndim != 2 or objects.shape[1] != embed_dim:
        shape = getattr(objects, "shape", None)
        found = "something else" if shape is None else f"entries of shape {tuple(shape)}"
        raise ValueError(
            f"MODEL.LOCALIZER.OBJECT_DICTIONARY {path} holds {found}, not vectors of this "
            f"localizer's embedding, whose length is {embed_dim}"
        )
    return objects


def class_heatmaps(
    objects: torch.Tensor, features: torch.Tensor, heatmaps: torch.Tensor
) -> torch.Tensor:
    """
    One map for each entry: its cosine with the features, times what is heard there.

    Args:
        objects: of shape (O, D), unit length.
        features: of shape (N, D, h, w).
        heatmaps: of shape (N, h, w).

    Returns:
        Tensor: of shape (N, O, h, w), not negative.
    """
    similarity = torch.einsum("od,ndhw->nohw", objects, F.normalize(features, dim=1))
    return similarity.relu() * heatmaps.relu()[:, None]


def heard_objects(maps: torch.Tensor) -> torch.Tensor:
    """
    Which entries are heard in an image: the peak of the map is at least half of the highest one,
    and no other entry's map is higher at that place, that is, it is this kind of object.

    Args:
        maps: of :func:`class_heatmaps` for one image, of shape (O, h, w).

    Returns:
        Tensor: int64, indices of entries, the highest peak first; empty where nothing is heard.
    """
    cells = maps.flatten(1)
    peaks, places = cells.max(dim=1)
    is_best = cells[:, places].amax(dim=0) <= peaks
    heard = is_best & (peaks > 0) & (peaks >= HEARD_SHARE * peaks.max())
    order = peaks.argsort(descending=True, stable=True)
    return order[heard[order]]
