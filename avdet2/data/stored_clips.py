# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Prepared clips as they lie in their shards, for what goes through all of them.
"""

from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np

from avdet2.data.packed import CLIP, FRAME, PackedClips


class StoredClips(PackedClips):
    """
    Prepared clips by their place, over all shards in turn, whatever files they were made of; frames
    and sound apart.
    """

    def places(self, shard: int) -> range:
        """
        Places of the clips of a shard.
        """
        first, end = np.searchsorted(self._shard_of, [shard, shard + 1])
        return range(first, end)

    def keys(self, shard: int) -> np.ndarray:
        """
        Hashes that the clips of a shard are found by, of shape (n, 2), uint64.
        """
        places = self.places(shard)
        clips = self._clips[places.start : places.stop]
        return np.stack([clips["key"], clips["check"]], axis=1)

    def place(self, clip: Mapping[str, Any]) -> int | None:
        """
        Where a clip is; None where it is not in it.
        """
        return self._find(clip)

    def shard_of(self, place: int) -> tuple[int, int]:
        """
        A clip's shard, and its number in it.
        """
        shard = int(self._shard_of[place])
        return shard, place - self.places(shard).start

    def times(self, place: int, name: str) -> np.ndarray:
        """
        Times of a clip's frames, in seconds from the start of its file.

        Args:
            place: of the clip.
            name: of its file, for messages; as in the methods below.

        Raises:
            MediaError: its part of the shard is damaged; as the methods below.
        """
        return self._table(place, name)["time"]

    def image(self, place: int, number: int, name: str) -> np.ndarray:
        """
        A frame of a clip, of shape (H, W, 3), uint8 RGB.
        """
        frame = self._table(place, name)[number]
        pictures, _ = self._mapped(int(self._shard_of[place]))
        begin = int(self._clips[place]["at"]) + int(frame["at"])
        jpeg = pictures[begin : begin + int(frame["size"])]
        self._check(jpeg, frame["crc"], {"file_name": name})
        return cv2.cvtColor(cv2.imdecode(jpeg, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)

    def sound(self, place: int, seconds: float, duration: float, name: str) -> np.ndarray:
        """
        The sound around a time, of shape (duration * sample_rate,), int16.
        """
        # As Python's integers: differences of unsigned ones would wrap.
        entry = dict(zip(CLIP.names, self._clips[place].item(), strict=True))
        _, sound = self._mapped(int(self._shard_of[place]))
        crcs = self._head(place, name)[entry["frames"] * FRAME.itemsize :].view("<u4")
        return self._window({"file_name": name}, entry, sound, crcs, seconds, duration)

    def _head(self, place: int, name: str) -> np.ndarray:
        entry = self._clips[place]
        pictures, _ = self._mapped(int(self._shard_of[place]))
        blocks = -(-int(entry["samples"]) // self.settings.sample_rate)
        at, size = int(entry["at"]), int(entry["frames"]) * FRAME.itemsize + 4 * blocks
        head = pictures[at : at + size]
        self._check(head, entry["crc"], {"file_name": name})
        return head

    def _table(self, place: int, name: str) -> np.ndarray:
        frames = int(self._clips[place]["frames"])
        return self._head(place, name)[: frames * FRAME.itemsize].view(FRAME)
