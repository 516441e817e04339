# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
From videos to batches.

* Clips: `clips` registers lists and folders of videos; `datasets` has the paper's.
* A sample: mappers (`av_mapper`, `frame_mapper`, `self_box_mapper`) cut `windows` of frames and
  take the sound around them, from videos (`media`) or from their prepared form (`prepared.reader`,
  made by `prepared.writer`, kept in a `prepared.store`).
* Self-boxes: heatmaps of windows (`window_maps`) on the fly or out of a cache (`heatmap_cache`,
  made by `heatmap_writer`, kept in a store as well).
* Batches: `loaders` and `batch`.
"""

from avdet2.data import datasets  # noqa: F401
from avdet2.data.clips import register_av_clips  # noqa: F401
from avdet2.data.mappers.av_mapper import AVMapper  # noqa: F401
from avdet2.data.mappers.frame_mapper import FrameMapper  # noqa: F401
