# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
From clip lists (csv, jsonl, parquet) and videos to registered data sets, by pyarrow.

A list is read into an Arrow table (:mod:`~avdet2.data.clips.reading`); what is known of its files
is looked up in an index that is mapped into memory, or found out (:mod:`~avdet2.data.clips.index`);
what can be used becomes a sequence of clip dicts (:mod:`~avdet2.data.clips.table`) and is
registered (:mod:`~avdet2.data.clips.registering`).
"""

from avdet2.data.clips.reading import is_clip_list, read_clip_list
from avdet2.data.clips.registering import (
    VIDEO_EXTENSIONS,
    ScannedClips,
    check_left_out,
    load_av_clips,
    read_once,
    register_av_clips,
    scan_clips,
    training_clips,
)
from avdet2.data.clips.table import ClipTable, label_pairs, single_labels

__all__ = [
    "VIDEO_EXTENSIONS",
    "ClipTable",
    "ScannedClips",
    "check_left_out",
    "is_clip_list",
    "label_pairs",
    "load_av_clips",
    "read_clip_list",
    "read_once",
    "register_av_clips",
    "scan_clips",
    "single_labels",
    "training_clips",
]
