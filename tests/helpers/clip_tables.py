# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Tables of clips from clip dicts, and indices of files that are not there.
"""

import os

import pyarrow as pa

from avdet2.data.clips import ClipTable
from avdet2.data.clips.index import FILES, INDEX_SUFFIX, Index, list_key, write_index
from avdet2.data.clips.table import COLUMNS


def clip_table(clips: list[dict]) -> ClipTable:
    """
    The clips as a table, each file once.
    """
    files = list(dict.fromkeys(os.fsencode(clip["file_name"]) for clip in clips))
    codes = [files.index(os.fsencode(clip["file_name"])) for clip in clips]
    columns = {name: [clip.get(name, 0) for clip in clips] for name in COLUMNS.names[1:-1]}
    columns["labels"] = [
        clip.get("labels", [clip["label"]] if "label" in clip else []) for clip in clips
    ]
    arrays = [pa.array(columns[field.name], field.type) for field in list(COLUMNS)[1:]]
    names = pa.array(files, pa.large_binary())
    file = pa.DictionaryArray.from_arrays(pa.array(codes, pa.int32()), names)
    return ClipTable(pa.table([file, *arrays], COLUMNS))


def indexed(source: str | os.PathLike[str], facts: dict[str, dict], key: str | None = None) -> str:
    """
    Write the index that a first look at a list's files would have made; returns its path.

    Args:
        source: path of the list.
        facts: of each file; by default it has 12 s of 340 x 256 pixels.
        key: of the list; by default its own, with files in /nowhere.
    """
    default = {"size": 1, "mtime": 1, "duration": 12.0, "width": 340, "height": 256}
    rows = [{"name": os.fsencode(file), **default, **fact} for file, fact in facts.items()]
    path = f"{source}{INDEX_SUFFIX}"
    key = key or list_key(str(source), "/nowhere")
    write_index(path, Index(pa.Table.from_pylist(rows, FILES), key))
    return path
