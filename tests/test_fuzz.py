# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Whatever is in a file or a value: it is read, or there is a ValueError; nothing else.
"""

import json
import math
from contextlib import suppress
from copy import deepcopy

import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from detectron2.data.datasets import load_coco_json

from avdet2.config_file import load_cfg
from avdet2.data.clips import read_clip_list
from avdet2.data.datasets.coco_file import read_coco
from avdet2.engine.config_rules import all_rules, check_values

few = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    # To make an example smaller may take minutes.
    phases=(Phase.generate,),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
numbers = st.one_of(st.integers(-5, 50), st.floats(-5, 50), st.sampled_from([math.nan, math.inf]))
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=5)),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
cells = st.one_of(numbers.map(str), st.text(max_size=6), st.sampled_from(["a.mp4", "", '"', "x|y"]))


def check_clips(path) -> None:
    with suppress(ValueError):
        clips = read_clip_list(str(path), "/base")
        assert all(0 <= start < math.inf for start in clips["start"].to_pylist())
        assert all(0 < seconds < math.inf for seconds in clips["duration"].to_pylist())
        assert all(file.as_py() for file in clips["file"])


@few
@given(
    rows=st.lists(st.lists(cells, min_size=3, max_size=5), max_size=5), tail=st.binary(max_size=9)
)
def test_csv(tmp_path, rows, tail):
    text = "file,start,duration,label\n" + "\n".join(",".join(row) for row in rows)
    path = tmp_path / "a.csv"
    path.write_bytes(text.encode("utf-8", "replace") + tail)
    check_clips(path)
    path.write_bytes(tail + text.encode("utf-8", "replace"))
    check_clips(path)


record = st.fixed_dictionaries(
    {"file": st.just("a.mp4") | values, "start": numbers | values, "duration": numbers | values},
    optional={"label": values},
)


@few
@given(lines=st.lists(record | values, max_size=5), tail=st.binary(max_size=9))
def test_jsonl(tmp_path, lines, tail):
    path = tmp_path / "a.jsonl"
    path.write_bytes("\n".join(map(json.dumps, lines)).encode() + tail)
    check_clips(path)


RIGHT = {
    "images": [{"id": i, "file_name": f"{i}.jpg", "width": 40, "height": 30} for i in (1, 2)],
    "annotations": [
        {"id": i, "image_id": 1, "category_id": 3, "bbox": [1, 2, 3.5, 4], "area": 14, "iscrowd": 0}
        for i in (1, 2)
    ],
    "categories": [{"id": 3, "name": "dog"}],
}


@few
@given(data=st.data())
def test_coco(tmp_path, data):
    content = deepcopy(RIGHT)
    for _ in range(data.draw(st.integers(1, 2))):
        part = data.draw(st.sampled_from(sorted(content)))
        entry = data.draw(st.sampled_from(content[part])) if isinstance(content[part], list) else {}
        if not isinstance(entry, dict) or not entry or data.draw(st.integers(0, 5)) == 0:
            content[part] = data.draw(values)
            continue
        key = data.draw(st.sampled_from(["id", *NEEDED[part]]))
        if data.draw(st.booleans()):
            entry.pop(key, None)
        else:
            entry[key] = data.draw(values)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    with suppress(ValueError):
        found = read_coco(str(path))
        # What is accepted is read by Detectron2 and pycocotools, too.
        assert len(load_coco_json(str(path), "")) == len(found["images"])


NEEDED = {
    "images": ["file_name", "width", "height"],
    "annotations": ["image_id", "category_id", "bbox"],
    "categories": ["name"],
}


@few
@given(key=st.sampled_from(sorted(all_rules())), value=st.one_of(values.map(str), cells))
def test_config_values(key, value):
    try:
        check_values(load_cfg("", [key, value]))
    except ValueError as error:
        assert key in str(error)


keys = st.sampled_from(["SOLVER", "MODEL", "MAX_ITER", "WEIGHTS", "_BASE_", "VERSION", "SEED"])
trees = st.recursive(
    values, lambda inner: st.dictionaries(keys | st.integers(0, 3), inner, max_size=4), max_leaves=6
)


@few
@given(tree=trees, noise=st.binary(max_size=6))
def test_config_files(tmp_path, tree, noise):
    path = tmp_path / "a.yaml"
    for content in (yaml.safe_dump(tree).encode(), yaml.safe_dump(tree).encode() + noise, noise):
        path.write_bytes(content)
        try:
            assert "SOLVER" in load_cfg(str(path))
        except (ValueError, OSError) as error:
            assert str(error)
