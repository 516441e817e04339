# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The frozen localizer's heatmaps of all prepared frames: made once (by
:mod:`avdet2.self_boxes.heatmap_writer`), cropped in training (by :mod:`avdet2.self_boxes.window_maps`).

To each shard of the prepared form belongs one of the cache, with the same clips in the same order.
Its `.maps` holds, clip after clip, a table of the clip's frames and, for each frame, the heatmap of
the whole frame and both modalities' logits in float16; its `.npz` where each clip lies. The `.npz`
is written last and atomically: with it the shard is whole, and is never written again.
`heatmaps.json` says what localizer and settings the heatmaps were made with.
"""

import hashlib
import json
import logging
import mmap
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from detectron2.utils.file_io import PathManager

from avdet2.data.media.video import MediaError
from avdet2.data.prepared.packed import MAX_OPEN_SHARDS, PackedClips

logger = logging.getLogger(__name__)

SETTINGS_FILE = "heatmaps.json"
NOT_FINITE = "its heatmap is not finite in float16"
# Why a frame has no heatmap, by its number in the table of frames.
FAILURES = (
    "",
    "no sound at that time",
    "damaged in its prepared form",
    NOT_FINITE,
    "cannot be read",
)
CACHED_FRAME = np.dtype(
    [
        ("time", "<f8"),
        ("at", "<u4"),
        ("height", "<u2"),
        ("width", "<u2"),
        ("crc", "<u4"),
        ("failure", "<u4"),
    ]
)
CACHED_CLIP = np.dtype(
    [
        ("key", "<u8"),
        ("check", "<u8"),
        ("at", "<u8"),
        ("size", "<u4"),
        ("frames", "<u4"),
        ("crc", "<u4"),
        ("whole", "<u4"),
        # The last of PackedClips.keys: a clip that was prepared anew has other frames.
        ("source", "<u4"),
    ]
)
# Columns of PackedClips.keys.
KEY = ("key", "check", "source")


@dataclass(frozen=True)
class CacheSettings:
    """
    What heatmaps were made with.

    Attributes:
        weights: path of the localizer's checkpoint at that time.
        sha256: of that file.
        stride: pixels of the localizer's image that a cell of the heatmap stands for.
        num_clusters: K, the length of the logits; 0 without clusters.
        config: the localizer's keys that matter, such as "INPUT.AV.FRAME_SIZE", with their values.
        packed: settings of the prepared form.
    """

    weights: str
    sha256: str
    stride: int
    num_clusters: int
    config: dict[str, Any]
    packed: dict[str, Any]


def file_hash(path: str) -> str:
    """
    The sha256 of a file.
    """
    digest = hashlib.sha256()
    with PathManager.open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_settings(folder: str) -> CacheSettings:
    """
    What `heatmaps.json` says.

    Raises:
        ValueError: the folder is no cache, or the file was changed.
    """
    path = Path(folder) / SETTINGS_FILE
    if not path.is_file():
        raise ValueError(f"{path} is missing: {folder} was not made by tools/cache_heatmaps.py")
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        settings = CacheSettings(**json.loads(text)["settings"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): make the heatmaps anew") from error
    if text != settings_text(settings):
        raise ValueError(f"{path} is not as it was written: make the heatmaps anew")
    return settings


def settings_text(settings: CacheSettings) -> str:
    """
    The text of `heatmaps.json`, with a checksum: a wrong number in it would shift all boxes.
    """
    content = asdict(settings)
    crc = zlib.crc32(json.dumps(content).encode())
    return json.dumps({"settings": content, "crc": crc}, indent=1)


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
    Prepared clips with the heatmaps of their frames. Cheap to copy into other processes: forked
    ones share the tables, and shards are mapped where they are first read.
    """

    def __init__(self, folder: str, prepared: str, weights: str):
        """
        Args:
            folder: that tools/cache_heatmaps.py wrote.
            prepared: folder of the prepared form that it was made from.
            weights: path of the localizer's checkpoint that it must have been made with.

        Raises:
            ValueError: the three do not belong together, or a shard is damaged.
        """
        self.folder, self.prepared, self.weights = Path(folder), prepared, weights
        self.settings = read_settings(folder)
        self.packed = PackedClips(prepared)
        self._check_settings()
        tables = [self._table(shard) for shard in range(len(self.packed.shards))]
        # A clip that is not there has no frames.
        self._clips = np.concatenate([np.zeros(0, CACHED_CLIP), *tables])
        self._mapped = lru_cache(MAX_OPEN_SHARDS)(self._map)
        absent = int((self._clips["frames"] == 0).sum())
        if absent:
            logger.warning(
                f"{folder} has no heatmaps of {absent} of the {len(self.packed)} clips in "
                f"{prepared}: the localizer runs for these; tools/cache_heatmaps.py adds them"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self.folder), self.prepared, self.weights)

    def __len__(self) -> int:
        return int((self._clips["frames"] > 0).sum())

    def __contains__(self, clip: Mapping[str, Any]) -> bool:
        place = self.packed.place(clip)
        return place is not None and self._clips[place]["frames"] > 0

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
        place = self.packed.place(clip)
        if place is None or not self._clips[place]["frames"]:
            raise KeyError(f"{clip['file_name']} at {clip['start']} s is not in {self.folder}")
        name, entry = clip["file_name"], self._clips[place]
        maps = self._mapped(self.packed.shard_of(place))
        at = int(entry["at"])
        head = maps[at : at + int(entry["frames"]) * CACHED_FRAME.itemsize]
        self._check(head, entry["crc"], name)
        table = head.view(CACHED_FRAME)
        number = int(np.abs(table["time"] - seconds).argmin())
        frame = table[number]
        if frame["failure"]:
            raise MediaError(name, FAILURES[frame["failure"]])
        count, shape = self.settings.num_clusters, (int(frame["height"]), int(frame["width"]))
        begin, cells = at + int(frame["at"]), shape[0] * shape[1]
        data = maps[begin : begin + 2 * (cells + 2 * count)]
        self._check(data, frame["crc"], name)
        values = data.view("<f2").astype(np.float32)
        heatmap, logits = values[:cells].reshape(shape), values[cells:].reshape(2, count)
        return self.packed.image(place, number, name), CachedHeatmap(heatmap, *logits)

    def _check(self, data: np.ndarray, crc: int, name: str) -> None:
        if zlib.crc32(data) != crc:
            raise MediaError(name, "damaged in the heatmap cache", str(self.folder))

    def _check_settings(self) -> None:
        settings = self.settings
        if not PathManager.isfile(self.weights):
            raise ValueError(
                f"MODEL.SELF_BOX.LOCALIZER_WEIGHTS {self.weights!r} is not a file: it must be the "
                f"checkpoint that MODEL.SELF_BOX.HEATMAPS {self.folder} was made with"
            )
        found = file_hash(self.weights)
        if found != settings.sha256:
            raise ValueError(
                f"MODEL.SELF_BOX.HEATMAPS {self.folder} was made with {settings.weights} (sha256 "
                f"{settings.sha256[:12]}), not with MODEL.SELF_BOX.LOCALIZER_WEIGHTS "
                f"{self.weights} (sha256 {found[:12]}): run tools/cache_heatmaps.py with these "
                "weights and another --output"
            )
        check_packed(settings, self.packed, str(self.folder))

    def _table(self, shard: int) -> np.ndarray:
        path = self.folder / f"{self.packed.shards[shard].stem}.npz"
        if not path.is_file():
            return np.zeros(len(self.packed.places(shard)), CACHED_CLIP)
        return load_table(path, self.packed.keys(shard))

    def _map(self, shard: int) -> np.ndarray:
        path = self.folder / f"{self.packed.shards[shard].stem}.maps"
        with open(path, "rb") as stream:
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(mapped, np.uint8)


def check_packed(settings: CacheSettings, packed: PackedClips, folder: str) -> None:
    """
    Raises:
        ValueError: the prepared form is not of the kind that a cache was made from.
    """
    if vars(packed.settings) != settings.packed:
        raise ValueError(
            f"the heatmaps in {folder} were made from frames and sound prepared with "
            f"{settings.packed}, not {vars(packed.settings)} as in {packed.folder}: set "
            "DATASETS.PREPARED to the folder they were made from, or make them anew"
        )


def load_table(path: Path, keys: np.ndarray) -> np.ndarray:
    """
    Where the clips of a finished shard lie.

    Args:
        path: of the shard's `.npz`.
        keys: of the prepared shard, see :meth:`PackedClips.keys`.

    Raises:
        ValueError: it is damaged, or of other clips, which the same clips prepared anew are, too.
    """
    advice = f"delete {path.stem}.* in {path.parent} and run tools/cache_heatmaps.py again"
    # The zip format has a checksum of its own.
    try:
        with np.load(path, allow_pickle=False) as stored:
            clips, size = stored["clips"], int(stored["size"])
        found = path.with_suffix(".maps").stat().st_size
        if found != size or clips.dtype != CACHED_CLIP:
            raise ValueError(f"{path.stem}.maps has {found} bytes instead of {size}")
    except Exception as error:
        raise ValueError(f"{path} is damaged ({error}): {advice}") from error
    if not np.array_equal(np.stack([clips[name] for name in KEY], axis=1), keys):
        raise ValueError(f"{path} is of other clips than the prepared shard of its name: {advice}")
    return clips
