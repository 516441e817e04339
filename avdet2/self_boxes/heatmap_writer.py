# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Runs the frozen localizer once over all prepared frames, and keeps what it makes of them;
avdet2/self_boxes/heatmap_cache.py describes and reads it.

A shard in the making is its `.maps` file, to which clips are only appended, and a log of the clips
that are in it as a whole. After a kill at any moment the next run goes on behind the last one that
is logged.
"""

import fcntl
import io
import json
import logging
import os
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, DataLoader
from tqdm import tqdm

from detectron2.config import CfgNode
from detectron2.utils import comm

from avdet2.config_file import flat_items
from avdet2.data.prepared.packed import PackedClips
from avdet2.data.prepared.packed_writer import write_whole
from avdet2.modeling.meta_arch.av_localizer import AVLocalizer
from avdet2.self_boxes.heatmap_cache import (
    CACHED_CLIP,
    CACHED_FRAME,
    FAILURES,
    KEY,
    NOT_FINITE,
    SETTINGS_FILE,
    CacheSettings,
    check_packed,
    file_hash,
    load_table,
    read_settings,
    settings_text,
)
from avdet2.self_boxes.heatmap_clips import ClipFrames, ShardClips

logger = logging.getLogger(__name__)

# So many clips are lost at most when a run is killed.
CLIPS_PER_FLUSH = 64
# So many frames of a clip go through the localizer at a time.
BATCH_SIZE = 64
# Parts of the localizer's config that its heatmaps depend on, beside the weights.
_KEYS = (
    "INPUT.AV.",
    "INPUT.FORMAT",
    "MODEL.PIXEL_",
    "MODEL.LOCALIZER.SPECTROGRAM.",
    "MODEL.LOCALIZER.OBJECTIVE",
    "MODEL.LOCALIZER.OBJECT_DICTIONARY",
    "MODEL.LOCALIZER.NORMALIZE",
    "MODEL.LOCALIZER.VISUAL_FEATURE",
)


def cache_settings(
    localizer: AVLocalizer, cfg: CfgNode, weights: str, packed: PackedClips
) -> CacheSettings:
    """
    What a cache of this localizer's heatmaps of these clips is made with.
    """
    config = {key: value for key, value in flat_items(cfg) if key.startswith(_KEYS)}
    settings = CacheSettings(
        weights=os.path.abspath(weights),
        sha256=file_hash(weights),
        stride=localizer.visual_stride,
        num_clusters=localizer.num_clusters if localizer.has_clusters else 0,
        config=config,
        packed=vars(packed.settings),
    )
    # As they are when they are read again: tuples become lists.
    return CacheSettings(**json.loads(json.dumps(asdict(settings))))


def write_heatmaps(
    localizer: AVLocalizer, cfg: CfgNode, weights: str, prepared: str, folder: str
) -> Counter[str]:
    """
    Make the heatmaps of all prepared clips that have none yet. Of several processes each takes its
    share of the shards.

    Args:
        localizer: in eval mode, with the weights; its batch norms may be folded.
        cfg: its config; DATALOADER.NUM_WORKERS is of the reading.
        weights: path of its checkpoint.
        prepared: folder of the prepared form.
        folder: of the cache; what it holds is kept and added to.

    Returns:
        The number of frames in all shards of this process's share that have a heatmap (under ""),
        and of those that have none, by reason.

    Raises:
        ValueError: the folder holds heatmaps of another localizer, of other settings or of other
            clips, or another process is writing there.
    """
    packed = PackedClips(prepared)
    settings = cache_settings(localizer, cfg, weights, packed)
    paths = [Path(folder) / f"{shard.stem}.npz" for shard in packed.shards]
    share = range(len(paths))[comm.get_rank() :: comm.get_world_size()]
    with _start_folder(Path(folder), settings, packed):
        for shard in share:
            if paths[shard].is_file():
                load_table(paths[shard], packed.keys(shard))
        todo = [shard for shard in share if not paths[shard].is_file()]
        _write_shards(localizer, cfg, packed, {shard: paths[shard] for shard in todo})
    return sum((_counts(paths[shard]) for shard in share), Counter())


def _write_shards(
    localizer: AVLocalizer, cfg: CfgNode, packed: PackedClips, paths: dict[int, Path]
) -> None:
    writers = [ShardWriter(path, packed.keys(shard)) for shard, path in paths.items()]
    parts = [ShardClips(packed, shard, writer.done, cfg) for shard, writer in zip(paths, writers)]
    # One loader for all: its workers read the next shard while one is finished.
    clips = iter(_loader(parts, cfg))
    total, silent = sum(map(len, parts)), not comm.is_main_process()
    with tqdm(desc="Heatmaps", total=total, unit="clip", disable=silent) as progress:
        for writer, part in zip(writers, parts, strict=True):
            with writer:
                for clip in islice(clips, len(part)):
                    writer.add(*_record(clip, *_outputs(localizer, clip)))
                    progress.update()
                writer.finish()


def _start_folder(folder: Path, settings: CacheSettings, packed: PackedClips) -> IO[str]:
    """
    Returns:
        the open file that keeps other runs out, until it is closed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / ".lock", "w")
    if comm.is_main_process():
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{folder}: another run is writing there") from error
        if not (folder / SETTINGS_FILE).exists():
            if any(folder.glob("*shard_*")):
                raise ValueError(
                    f"{folder} holds shards, but no {SETTINGS_FILE}, which says what they were "
                    "made with: use another folder"
                )
            write_whole(folder / SETTINGS_FILE, settings_text(settings).encode())
        fcntl.flock(lock, fcntl.LOCK_SH)
    comm.synchronize()
    # The last process of this run to end is the one that lets others in.
    fcntl.flock(lock, fcntl.LOCK_SH)
    found = read_settings(str(folder))
    check_packed(found, packed, str(folder))
    # The same weights may have moved.
    if replace(found, weights=settings.weights) != settings:
        old, new = asdict(found), asdict(settings)
        wrong = [f"{key} {old[key]} and not {new[key]}" for key in new if old[key] != new[key]]
        raise ValueError(
            f"{folder} holds heatmaps made with {'; '.join(wrong)}: use another folder"
        )
    return lock


def _as_it_is(clip: ClipFrames) -> ClipFrames:
    return clip


def _loader(parts: list[ShardClips], cfg: CfgNode) -> Sequence[ClipFrames] | DataLoader:
    if not parts:
        return []
    return DataLoader(
        ConcatDataset(parts),
        batch_size=None,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=_as_it_is,
        pin_memory=torch.device(cfg.MODEL.DEVICE).type == "cuda",
    )


@torch.inference_mode()
def _outputs(localizer: AVLocalizer, clip: ClipFrames) -> tuple[np.ndarray, tuple[int, int]]:
    """
    Of each frame without a failure the heatmap and both modalities' logits, in a row of the result
    (m, h * w + 2 * K), float16; and (h, w). They do not depend on a clip's neighbours.
    """
    rows = []
    height = width = 0
    for begin in range(0, len(clip.images), BATCH_SIZE):
        images = clip.images[begin : begin + BATCH_SIZE].to(localizer.device, non_blocking=True)
        sounds = clip.waveforms[begin : begin + BATCH_SIZE].to(localizer.device, non_blocking=True)
        batch = [{"image": x, "waveform": y} for x, y in zip(images, sounds, strict=True)]
        maps, features = localizer.localize(batch)
        height, width = maps.shape[1:]
        values = [maps.flatten(1).float()]
        if localizer.has_clusters:
            values += [features.logits_v.float(), features.logits_a.float()]
        rows.append(torch.cat(values, dim=1).half().cpu().numpy())
    values = np.concatenate(rows) if rows else np.zeros((0, 0), np.float16)
    return values, (height, width)


def _record(
    clip: ClipFrames, values: np.ndarray, shape: tuple[int, int]
) -> tuple[np.ndarray, bytes]:
    """
    A clip's row (1,) of the table of clips, without its place, and its part of the `.maps` file.
    """
    table = np.zeros(len(clip.times), CACHED_FRAME)
    table["time"], table["failure"] = clip.times, clip.failures
    finite = np.isfinite(values).all(axis=1)
    table["failure"][np.flatnonzero(clip.failures == 0)[~finite]] = FAILURES.index(NOT_FINITE)
    values = values[finite].astype("<f2")
    there = np.flatnonzero(table["failure"] == 0)
    table["height"][there], table["width"][there] = shape
    table["at"][there] = table.nbytes + np.arange(len(there)) * values[:1].nbytes
    table["crc"][there] = [zlib.crc32(row) for row in values]
    record = table.tobytes() + values.tobytes()
    row = np.zeros(1, CACHED_CLIP)
    row["key"], row["check"], row["source"] = clip.key
    row["size"], row["frames"] = len(record), len(table)
    row["crc"], row["whole"] = zlib.crc32(table.tobytes()), zlib.crc32(record)
    return row, record


class ShardWriter:
    """
    Makes a shard of the cache, in a `with` statement; what is left of an earlier run is kept.

    Attributes:
        done: the number of clips that are in it already; the next one is to be added.
    """

    def __init__(self, path: Path, keys: np.ndarray) -> None:
        """
        Args:
            path: of its `.npz`.
            keys: of the prepared shard, see :meth:`PackedClips.keys`.
        """
        self.path, self._maps = path, path.with_suffix(".maps")
        self._log = path.with_name(f".{path.stem}.log")
        self._rows = self._logged(keys)
        self.done = sum(map(len, self._rows))
        self._unwritten: list[tuple[np.ndarray, bytes]] = []

    def __enter__(self) -> "ShardWriter":
        # What is behind the last whole clip was not logged, or is damaged.
        self._files = [open(path, "ab") for path in (self._maps, self._log)]
        self._end = sum(int(rows["size"].sum()) for rows in self._rows)
        for stream, size in zip(self._files, (self._end, self.done * CACHED_CLIP.itemsize)):
            stream.truncate(size)
        return self

    def __exit__(self, *_: Any) -> None:
        # Also after an error: what was added is complete.
        self._flush()
        for stream in self._files:
            stream.close()

    def add(self, row: np.ndarray, record: bytes) -> None:
        """
        Append a clip, which must be the next one of the prepared shard.
        """
        self._unwritten.append((row, record))
        if len(self._unwritten) >= CLIPS_PER_FLUSH:
            self._flush()

    def finish(self) -> None:
        """
        Close the shard for good: with this it counts.
        """
        self._flush()
        clips = np.concatenate([np.zeros(0, CACHED_CLIP), *self._rows])
        data = np.fromfile(self._maps, np.uint8)
        failures = np.zeros(len(FAILURES), np.int64)
        for clip in clips:
            head = data[int(clip["at"]) :][: int(clip["frames"]) * CACHED_FRAME.itemsize]
            failures += np.bincount(head.view(CACHED_FRAME)["failure"], minlength=len(FAILURES))
        index = io.BytesIO()
        np.savez(index, clips=clips, size=np.int64(self._end), failures=failures)
        write_whole(self.path, index.getvalue())
        self._log.unlink()

    def _flush(self) -> None:
        if not self._unwritten:
            return
        rows = np.concatenate([row for row, _ in self._unwritten])
        rows["at"] = self._end + np.cumsum(rows["size"], dtype=np.uint64) - rows["size"]
        data = b"".join(record for _, record in self._unwritten)
        # The clips themselves are on the disk before the log says so.
        for stream, added in zip(self._files, (data, rows.tobytes()), strict=True):
            stream.write(added)
            stream.flush()
            os.fsync(stream.fileno())
        self._rows.append(rows)
        self._end += len(data)
        self._unwritten = []

    def _logged(self, keys: np.ndarray) -> list[np.ndarray]:
        """
        Rows of the clips that an earlier run has left whole.
        """
        if not (self._log.is_file() and self._maps.is_file()):
            return []
        log, data = self._log.read_bytes(), np.fromfile(self._maps, np.uint8)
        # The last row may have been cut short.
        rows = np.frombuffer(log, CACHED_CLIP, len(log) // CACHED_CLIP.itemsize)
        end, whole = 0, 0
        for row, key in zip(rows, keys.tolist()):
            record = data[end : end + int(row["size"])]
            end += int(row["size"])
            if [row[name] for name in KEY] != key or zlib.crc32(record) != row["whole"]:
                break
            whole += 1
        if whole < len(rows):
            logger.warning(
                f"{self._maps} is damaged behind its clip {whole}: the {len(rows) - whole} clips "
                "that were logged after it are made again"
            )
        return [rows[:whole]]


def _counts(path: Path) -> Counter[str]:
    with np.load(path, allow_pickle=False) as stored:
        return Counter(dict(zip(FAILURES, stored["failures"].tolist(), strict=True)))
