# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The frozen localizer's heatmaps of all prepared frames: made once (by
:mod:`avdet2.self_boxes.heatmap_writer`), cropped in training (by
:mod:`avdet2.self_boxes.window_maps`).

They are in a store (:mod:`avdet2.data.prepared.store`). The parts of a clip's record are a head (h
and w of its heatmaps; for each frame 0, or why it has none: a number of FAILURES), and for each
frame the heatmap of the whole frame and both modalities' logits, float16.
"""

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from detectron2.utils.file_io import PathManager

from avdet2.data.media.video import MediaError
from avdet2.data.prepared.reader import DAMAGED, NO_SOUND, PreparedClips
from avdet2.data.prepared.store import Store
from avdet2.utils.files import sha256_of_file

logger = logging.getLogger(__name__)

NOT_FINITE = "its heatmap is not finite in float16"
# Why a frame has no heatmap, by its number in a record's head.
FAILURES = ("", NO_SOUND, DAMAGED, NOT_FINITE, "cannot be read")


class Heatmaps(Store):
    """
    The store of a cache. Its settings: `sha256` of the localizer's checkpoint; `stride`, pixels of
    its image that a cell stands for; `num_clusters`, K, the length of the logits, 0 without
    clusters; `config`, the localizer's keys that matter with their values; `prepared`, settings of
    the prepared clips. The numbers of a record count the clip's frames by FAILURES.
    """

    settings_file, tool = "heatmaps.json", "tools/cache_heatmaps.py"
    numbers = [(f"frames_{i}", "<u4") for i in range(len(FAILURES))]


def heatmap_keys(prepared: PreparedClips) -> np.ndarray:
    """
    Keys of the heatmaps of prepared clips, by place. A clip that was prepared anew with other
    content has another.
    """
    words = np.frombuffer(prepared.rows["key"].tobytes(), "<u4").reshape(-1, 4).copy()
    words[:, 3] ^= prepared.rows["crc"]
    return words.view("S16")[:, 0]


class CachedHeatmap(NamedTuple):
    """
    What the localizer made of a frame and its sound.

    Attributes:
        heatmap: of the whole frame, of shape (h, w), float32.
        logits_v, logits_a: of shape (K,), float32; K = 0 without clusters.
    """

    heatmap: np.ndarray
    logits_v: np.ndarray
    logits_a: np.ndarray


class HeatmapCache:
    """
    Prepared clips with the heatmaps of their frames. Cheap to copy into other processes, as stores
    are.
    """

    def __init__(self, folder: str, prepared: str, weights: str) -> None:
        """
        Args:
            folder: that tools/cache_heatmaps.py wrote.
            prepared: folder of the prepared form that it was made from.
            weights: path of the localizer's checkpoint that it must have been made with.

        Raises:
            ValueError: the three do not belong together, or a shard is damaged.
        """
        self.folder, self.store = folder, Heatmaps(folder)
        self.settings, self.prepared = self.store.settings, PreparedClips(prepared)
        self._check(weights)
        #: Places of the prepared clips' heatmaps; -1 without.
        self._places = self.store.find(heatmap_keys(self.prepared))
        places = self.prepared.places()
        self._count = int((self._places[places] >= 0).sum())
        if self._count < len(places):
            logger.warning(
                f"{folder} has no heatmaps of {len(places) - self._count} of the {len(places)} "
                f"clips in {prepared}: the localizer runs for these; tools/cache_heatmaps.py adds "
                "them"
            )

    def __len__(self) -> int:
        return self._count

    def __contains__(self, clip: Mapping[str, Any]) -> bool:
        place = self.prepared.place(clip)
        return place is not None and self._places[place] >= 0

    def read(self, clip: Mapping[str, Any], seconds: float) -> tuple[np.ndarray, CachedHeatmap]:
        """
        The stored frame nearest to a time, (H, W, 3) uint8 RGB, and what the localizer made of it.

        Args:
            clip: dict with `file_name`, `start` and `duration`.
            seconds: from the start of the file.

        Raises:
            KeyError: the clip is not in it.
            MediaError: that frame has no heatmap (no sound around it, or no finite one), or a
                checksum is wrong.
        """
        place, name = self.prepared.place(clip), clip["file_name"]
        if place is None or self._places[place] < 0:
            raise KeyError(f"{name} at {clip['start']} s is not in {self.folder}")
        try:
            stored = self.prepared.clip(place)
            number = stored.nearest(seconds)
            image = stored.image(number)
        except ValueError as error:
            raise MediaError(name, DAMAGED, str(error)) from error
        try:
            record = self.store.record(self._places[place])
            height, width, *failures = record[0].view("<u2").tolist()
            if failures[number]:
                raise MediaError(name, FAILURES[failures[number]])
            values = record[1 + number].view("<f2").astype(np.float32)
        except ValueError as error:
            raise MediaError(name, "damaged in the heatmap cache", str(error)) from error
        cells = height * width
        heatmap, logits = values[:cells].reshape(height, width), values[cells:].reshape(2, -1)
        return image, CachedHeatmap(heatmap, *logits)

    def _check(self, weights: str) -> None:
        if not PathManager.isfile(weights):
            raise ValueError(
                f"MODEL.SELF_BOX.LOCALIZER_WEIGHTS {weights!r} is not a file: it must be the "
                f"checkpoint that MODEL.SELF_BOX.HEATMAPS {self.folder} was made with"
            )
        found, sha256 = file_hash(weights), self.settings["sha256"]
        if found != sha256:
            raise ValueError(
                f"MODEL.SELF_BOX.HEATMAPS {self.folder} was made with "
                f"{self.store.notes.get('weights')} (sha256 {sha256[:12]}), not with MODEL."
                f"SELF_BOX.LOCALIZER_WEIGHTS {weights} (sha256 {found[:12]}): run "
                "tools/cache_heatmaps.py with these weights and another --output"
            )
        if self.settings["prepared"] != self.prepared.settings:
            raise ValueError(
                f"the heatmaps in {self.folder} were made from frames and sound prepared with "
                f"{self.settings['prepared']}, not {self.prepared.settings} as in "
                f"{self.prepared.folder}: set DATASETS.PREPARED to the folder they were made from, "
                "or make them anew"
            )


def file_hash(path: str) -> str:
    """
    The sha256 of a file, wherever it is.
    """
    return sha256_of_file(PathManager.get_local_path(path))
