# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Runs the frozen localizer once over all prepared frames, whole, with the sound around each, and
keeps what it makes of them; :mod:`avdet2.self_boxes.heatmap_cache` says how, and reads it.
"""

import os
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.utils import comm

from avdet2.data.mappers.av_mapper import full_frame_size, limit_threads, to_image_tensor
from avdet2.data.media.video import is_mute
from avdet2.data.prepared.reader import DAMAGED, NO_SOUND, PreparedClips
from avdet2.data.prepared.store import StoreWriter
from avdet2.modeling.meta_arch.av_localizer import AVLocalizer
from avdet2.self_boxes.heatmap_cache import (
    FAILURES,
    NOT_FINITE,
    Heatmaps,
    file_hash,
    heatmap_keys,
)
from avdet2.self_boxes.teacher import heatmap_config
from avdet2.utils.progress import progress

# So many frames of a clip go through the localizer at a time.
BATCH_SIZE = 64


def write_heatmaps(
    localizer: AVLocalizer,
    cfg: CfgNode,
    weights: str,
    prepared: str,
    folder: str,
    shard_bytes: int = 1 << 28,
) -> Counter[str]:
    """
    Make the heatmaps of all prepared clips that have none yet. Of several processes each takes its
    share of these.

    Args:
        localizer: in eval mode, with the weights; its batch norms may be folded.
        cfg: its config; DATALOADER.NUM_WORKERS is of the reading.
        weights: path of its checkpoint.
        prepared: folder of the prepared form.
        folder: of the cache; what it holds is kept and added to.
        shard_bytes: a shard that has reached so many is closed.

    Returns:
        The number of frames in all clips that have a heatmap (under ""), and of those that have
        none, by reason. All processes get the same.

    Raises:
        ValueError: the folder holds heatmaps of another localizer or of other settings, or another
            run is writing there.
    """
    clips = PreparedClips(prepared)
    settings = {
        "sha256": file_hash(weights),
        "stride": localizer.visual_stride,
        "num_clusters": localizer.num_clusters,
        "config": heatmap_config(cfg),
        "prepared": clips.settings,
    }
    notes = {"weights": os.path.abspath(weights)}
    keys = heatmap_keys(clips)
    with StoreWriter(Heatmaps, folder, settings, notes, shard_bytes) as writer:
        places = clips.places()
        todo = places[writer.store.find(keys[places]) < 0]
        todo = todo[comm.get_rank() :: comm.get_world_size()]
        loader = DataLoader(
            _Frames(clips, todo, cfg),
            batch_size=None,
            num_workers=cfg.DATALOADER.NUM_WORKERS if len(todo) else 0,
            pin_memory=torch.device(cfg.MODEL.DEVICE).type == "cuda",
            collate_fn=_as_it_is,
        )
        silent = not comm.is_main_process()
        clips = progress(loader, desc="Heatmaps", unit="clip", disable=silent)
        for place, frames in zip(todo, clips, strict=True):
            writer.put(keys[place], *_record(localizer, frames))
    store = Heatmaps(folder)
    rows = store.rows[np.unique(store.find(keys[places]))]
    return Counter({why: int(rows[f"frames_{i}"].sum()) for i, why in enumerate(FAILURES)})


class ClipFrames(NamedTuple):
    """
    What the localizer needs of a clip with n stored frames.

    Attributes:
        failures: why they cannot be used, of shape (n,), numbers of FAILURES; 0 where they can.
        images: of the m frames without a failure, of shape (m, 3, h, w), uint8.
        waveforms: of the same frames, of shape (m, T), int16.
    """

    failures: np.ndarray
    images: torch.Tensor
    waveforms: torch.Tensor


def _as_it_is(frames: ClipFrames) -> ClipFrames:
    return frames


class _Frames(Dataset):
    """
    The frames of clips at some places.
    """

    def __init__(self, clips: PreparedClips, places: Sequence[int], cfg: CfgNode) -> None:
        self.clips, self.places = clips, places
        self.node, self.image_format = cfg.INPUT.AV, cfg.INPUT.FORMAT

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> ClipFrames:
        limit_threads()
        images, waveforms = [], []
        try:
            clip = self.clips.clip(self.places[index])
            failures = np.zeros(len(clip.times), np.int64)
        except ValueError:
            # Nothing is known of its frames.
            clip, failures = None, np.array([FAILURES.index(DAMAGED)])
        for number in range(len(clip.times) if clip else 0):
            try:
                waveform = clip.sound(float(clip.times[number]), self.node.AUDIO_SECONDS)
                if waveform is None or is_mute(waveform):
                    failures[number] = FAILURES.index(NO_SOUND)
                    continue
                image = clip.image(number)
            except ValueError:
                failures[number] = FAILURES.index(DAMAGED)
                continue
            # A clip's frames have one size; a video that changes its own is stretched to the first.
            size = images[0].shape[1:] if images else self._size(image)
            transform = T.ResizeTransform(*image.shape[:2], *size)
            images.append(to_image_tensor(image, transform, self.image_format))
            waveforms.append(torch.from_numpy(waveform))
        if not images:
            return ClipFrames(failures, torch.zeros(0), torch.zeros(0))
        return ClipFrames(failures, torch.stack(images), torch.stack(waveforms))

    def _size(self, image: np.ndarray) -> tuple[int, int]:
        return full_frame_size(*image.shape[:2], self.node.FRAME_SIZE)


@torch.inference_mode()
def _record(localizer: AVLocalizer, frames: ClipFrames) -> tuple[list[bytes], dict[str, int]]:
    """
    The parts and numbers of a clip's record. They do not depend on the clip's neighbours.
    """
    rows, shape = [], (0, 0)
    for begin in range(0, len(frames.images), BATCH_SIZE):
        images = frames.images[begin : begin + BATCH_SIZE].to(localizer.device, non_blocking=True)
        sounds = frames.waveforms[begin : begin + BATCH_SIZE]
        sounds = sounds.to(localizer.device, non_blocking=True)
        batch = [{"image": x, "waveform": y} for x, y in zip(images, sounds, strict=True)]
        maps, features = localizer.localize(batch)
        shape, values = maps.shape[1:], [maps.flatten(1).float()]
        if localizer.has_clusters:
            values += [features.logits_v.float(), features.logits_a.float()]
        rows += list(torch.cat(values, dim=1).half().cpu().numpy().astype("<f2"))
    failures, parts, made = frames.failures.copy(), [], iter(rows)
    for number, failure in enumerate(failures):
        values = b"" if failure else next(made)
        if not failure and not np.isfinite(values).all():
            failures[number], values = FAILURES.index(NOT_FINITE), b""
        parts.append(bytes(values))
    head = np.array([*shape, *failures], "<u2").tobytes()
    counts = np.bincount(failures, minlength=len(FAILURES)).tolist()
    return [head, *parts], {f"frames_{i}": count for i, count in enumerate(counts)}
