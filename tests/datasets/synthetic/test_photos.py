# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The benchmark from cut-outs, recordings and pictures: exact boxes, ingredients of its own for each
split, the sound of the class, and clear words for files that cannot be used.

The ingredients are drawn here: cut-outs without green, red in train and blue in test; pictures of
one grey; pure tones, whose frequency tells class and split.
"""

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from synthetic.generator import Settings, make_item, plan_test_image
from synthetic.ingredients import find_photos
from synthetic.materials import PHOTO_DIFFICULTIES
from synthetic.scenes import render
from synthetic.sounds import SAMPLE_RATE

_SCRIPT = Path(__file__).resolve().parents[3] / "datasets" / "prepare_synthetic.py"
_CLASSES = ("bell", "cup", "drum")
_KINDS = ("objects", "sounds", "backgrounds")
_GREY = 160


def _tone(category, split):
    return 400 + 300 * category + (100 if split == "test" else 0)


def _cutout(split, stretch):
    picture = np.zeros((40, 60, 4), np.uint8)
    axes = (28, 8 + 4 * stretch)
    cv2.ellipse(picture, (30, 20), axes, 0, 0, 360, (0, 0, 0, 255), -1, cv2.LINE_AA)
    picture[..., 0 if split == "test" else 2] = 220
    return picture


def _write_ogg(path, waveform):
    codec = "libvorbis" if "libvorbis" in av.codecs_available else "libopus"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=SAMPLE_RATE, layout="mono")
        samples = waveform.astype(np.float32)[None]
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        frame.sample_rate, frame.pts = SAMPLE_RATE, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _fill(root, splits=("train", "test"), count=4):
    """
    Write ingredients; without splits, the folders have no such level.
    """
    for split in splits or ("",):
        for category, name in enumerate(_CLASSES):
            for kind in ("objects", "sounds"):
                (root / kind / name / split).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                place = root / "objects" / name / split / f"{i}.png"
                cv2.imwrite(str(place), _cutout(split, i % 3))
                times = np.arange(int(0.3 * SAMPLE_RATE)) / SAMPLE_RATE
                tone = 0.5 * np.sin(2 * np.pi * _tone(category, split) * times)
                sound = root / "sounds" / name / split / f"{i}.ogg"
                _write_ogg(sound, tone)
        (root / "backgrounds" / split).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            picture = np.full((60, 90, 3), _GREY, np.uint8)
            cv2.imwrite(str(root / "backgrounds" / split / f"{i}.jpg"), picture)
    return {kind: str(root / kind) for kind in _KINDS}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    photos, _ = find_photos(_fill(tmp_path_factory.mktemp("ingredients")), seed=0)
    return Settings(len(_CLASSES), (80, 64), 1.0, photos=photos)


def _box(mask):
    rows, columns = np.nonzero(mask)
    x, y = columns.min(), rows.min()
    return [x, y, columns.max() - x + 1, rows.max() - y + 1]


def test_boxes_are_those_of_the_masks(settings):
    seen = 0
    for index in range(12):
        item = make_item(settings, "test", index)
        assert item.frames.shape == (8, 64, 80, 3)
        if len(item.truth["objects"]) > 1:
            continue
        (entry,) = item.truth["objects"]
        for frame, box in enumerate(entry["track"]):
            # Cut-outs have no green at all: half of the grey is half of the object.
            green = render(item.scene, frame)[..., 1]
            assert np.abs(np.subtract(_box(green <= _GREY / 2), box)).max() <= 1
        assert entry["box"] == entry["track"][settings.key_frame]
        assert 0.28 * 64 <= max(entry["box"][2:]) <= 0.6 * 64 + 1
        seen += 1
    assert seen >= 3


def test_same_arguments_same_content(settings):
    digests = [make_item(settings, *which).truth["digest"] for which in (("train", 1),) * 2]
    assert digests[0] == digests[1]
    assert make_item(settings, "val", 1).truth["digest"] != digests[0]


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_each_split_shows_and_plays_its_own(settings, split):
    side = "test" if split == "test" else "train"
    for index in range(4):
        item = make_item(settings, split, index)
        picture = render(item.scene, 0).astype(int)
        reddest = (picture[..., 0] - picture[..., 2])[picture[..., 1] < 20]
        assert (reddest > 50).all() if side == "train" else (reddest < -50).all()
        power = np.abs(np.fft.rfft(item.waveform.astype(float)))
        heard = np.fft.rfftfreq(len(item.waveform), 1 / SAMPLE_RATE)[100:][power[100:].argmax()]
        assert abs(heard - _tone(item.truth["sounds"][0]["category"], side)) < 5
        sounding = [entry["category"] for entry in item.truth["objects"] if entry["sounding"]]
        assert sounding == [item.truth["sounds"][0]["category"]]


def _all_files(photos, split):
    return {
        f"{kind}/{file}"
        for kind, classes in photos.files[split].items()
        for files in classes.values()
        for file in files
    }


@pytest.mark.parametrize("splits", [(), ("train", "test"), ("train", "val", "test")])
def test_no_file_is_in_two_splits(tmp_path, splits):
    roots = _fill(tmp_path, splits, count=8)
    photos, lines = find_photos(roots, seed=3)
    sets = [_all_files(photos, split) for split in ("train", "val", "test")]
    there = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.*") if p.is_file()}
    assert set.union(*sets) == there and sum(map(len, sets)) == len(there)
    for split, files in zip(("train", "val", "test"), sets, strict=True):
        assert split not in splits or not [
            f for f in files if f"/{split}/" not in f and split != "train"
        ]
        # Seven places: three classes of objects and of sounds, and the backgrounds.
        assert len(files) == 7 * {"train": 8, "val": 8, "test": 8}[split] or len(splits) < 3
    again = find_photos(roots, seed=3)[0]
    assert again == photos
    said = "seed 3" in lines[1]
    assert said == (len(splits) < 3)
    if said:
        assert _all_files(find_photos(roots, seed=4)[0], "val") != sets[1]
    if not splits:
        assert [len(files) for files in sets] == [7 * 5, 7 * 1, 7 * 2]


def test_files_that_cannot_be_used_are_counted(tmp_path):
    roots = _fill(tmp_path)
    objects, sounds = tmp_path / "objects" / "cup" / "train", tmp_path / "sounds" / "cup" / "train"
    (objects / "broken.png").write_bytes(b"no picture")
    cv2.imwrite(str(objects / "solid.png"), np.zeros((20, 20, 3), np.uint8))
    cv2.imwrite(str(objects / "void.png"), np.zeros((20, 20, 4), np.uint8))
    _write_ogg(sounds / "click.ogg", np.full(600, 0.5))
    _write_ogg(sounds / "mute.ogg", np.zeros(24000))
    (sounds / "broken.ogg").write_bytes(b"no sound")
    (tmp_path / "backgrounds" / "train" / "broken.jpg").write_bytes(b"no picture")
    photos, told = find_photos(roots, seed=0)
    lines = [line for line in told if not line.startswith(" ")]
    assert "24 found, 3 missing" in lines[0] and "1 x no alpha channel" in lines[0]
    assert "1 x cannot be read (such as cup/train/broken.png)" in lines[0]
    assert "1 x transparent everywhere" in lines[0]
    assert "24 found, 3 missing" in lines[1] and "1 x shorter than 0.1 s" in lines[1]
    assert "1 x mute" in lines[1] and "8 found, 1 missing" in lines[2]
    files = set.union(*(_all_files(photos, split) for split in photos.files))
    assert not [f for f in files if Path(f).stem in ("broken", "solid", "void", "click", "mute")]


def test_copies_in_two_splits_are_told(tmp_path):
    roots = _fill(tmp_path)
    places = sorted((tmp_path / "backgrounds").rglob("*.jpg"))
    for i, place in enumerate(places):
        cv2.imwrite(str(place), np.full((60, 90, 3), 40 + 10 * i, np.uint8))
    assert not [line for line in find_photos(roots, seed=0)[1][-2:] if "copy" in line]
    first, other = tmp_path / "backgrounds/train/0.jpg", tmp_path / "backgrounds/test/1.jpg"
    other.write_bytes(first.read_bytes())
    told = find_photos(roots, seed=0)[1][-1]
    # Of test/1.jpg and train/0.jpg, in the order of the splits.
    assert "2 files have a copy in another split (such as test/1.jpg)" in told


def _without(root, *parts):
    place = root.joinpath(*parts)
    for path in sorted(place.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    return place


@pytest.mark.parametrize("kind", ["objects", "sounds"])
def test_a_class_without_its_other_half(tmp_path, kind):
    roots = _fill(tmp_path)
    _without(tmp_path, kind, "cup").rmdir()
    with pytest.raises(ValueError, match=rf"/{kind}: no folder cup, but there is in"):
        find_photos(roots, seed=0)


def test_folders_without_what_is_needed(tmp_path):
    roots = _fill(tmp_path)
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        find_photos(roots | {"backgrounds": str(tmp_path / "nowhere")}, seed=0)
    with pytest.raises(ValueError, match="at least 2 are needed"):
        find_photos(roots | {"objects": str(tmp_path / "objects" / "cup" / "train")}, seed=0)
    _without(tmp_path, "sounds", "drum", "test")
    with pytest.raises(ValueError, match="drum/test: no file"):
        find_photos(roots, seed=0)
    (tmp_path / "sounds" / "drum" / "test").rmdir()
    (tmp_path / "sounds" / "drum" / "train").rename(tmp_path / "sounds" / "drum" / "val")
    with pytest.raises(ValueError, match="there is val, but no train"):
        find_photos(roots, seed=0)
    (tmp_path / "sounds" / "drum" / "val").rename(tmp_path / "sounds" / "drum" / "train")
    for i in (1, 2, 3):
        (tmp_path / "sounds" / "drum" / "train" / f"{i}.ogg").unlink()
    with pytest.raises(ValueError, match="sounds/drum: too few files.*nothing is left for"):
        find_photos(roots, seed=0)


def test_backgrounds_pan_and_zoom_within_the_picture(tmp_path):
    roots = _fill(tmp_path)
    ramp = np.broadcast_to(np.arange(20, 200, dtype=np.uint8)[None, :, None], (120, 180, 3))
    for path in (tmp_path / "backgrounds").rglob("*.jpg"):
        cv2.imwrite(str(path), ramp, [cv2.IMWRITE_JPEG_QUALITY, 100])
    material = find_photos(roots, seed=0)[0].of("train", PHOTO_DIFFICULTIES["easy"])
    zooms = []
    for index in range(10):
        frames = material.background((90, 60), 8, np.random.default_rng(index))
        assert frames.shape == (8, 60, 90, 3) and frames.min() > 15 and frames.max() < 205
        # The frame is 90 pixels wide; the picture covers it 1.25 times.
        slopes = np.abs(np.diff(frames[:, 30, 5:85, 0], axis=1).mean(axis=1)) * 90 * 1.25 / 180
        assert slopes.min() > 0.98 and slopes.max() < 1.27
        assert np.abs(np.diff(frames[..., 45, 0], axis=0)).max() < 10
        zooms.append(slopes[-1] / slopes[0])
    assert min(zooms) < 0.95 and max(zooms) > 1.05


def test_difficulty_steers_scenes_of_photographs(settings):
    hard = replace(settings, difficulty="hard")
    scenes = [make_item(hard, "train", index).scene for index in range(6)]
    patches = [sum(layer.instance < 0 for layer in scene.layers) for scene in scenes]
    assert min(patches) >= 1 and max(patches) <= 3
    rng = np.random.default_rng(0)
    counts = np.bincount([len(plan_test_image(hard, rng)[0]) for _ in range(500)])
    assert np.allclose(counts / 500, [0, 0.40, 0.35, 0.25], atol=0.08)


def _run(monkeypatch, capsys, root, *options):
    words = "--clips 4 --val 2 --test 3 --size 80 64 --seconds 1 --workers 1"
    argv = [str(_SCRIPT), "--output", str(root), *words.split(), *map(str, options)]
    monkeypatch.setattr(sys, "argv", argv)
    runpy.run_path(str(_SCRIPT), run_name="__main__")
    return capsys.readouterr().out


def test_script_makes_a_data_set_that_is_registered(tmp_path, monkeypatch, capsys):
    from detectron2.data import DatasetCatalog, MetadataCatalog

    from avdet2.data.datasets.synthetic import register_synthetic

    folders = _fill(tmp_path / "in")
    options = [word for kind in _KINDS for word in (f"--{kind}", folders[kind])]
    out = tmp_path / "out"
    assert "9 items made" in _run(monkeypatch, capsys, out, *options)
    register_synthetic(str(out), "photos_test")
    clips = DatasetCatalog.get("photos_test_train")
    assert tuple(MetadataCatalog.get("photos_test_train").label_classes) == _CLASSES
    assert len(clips) == 4
    assert all((clip["width"], clip["height"]) == (80, 64) for clip in clips)
    images = DatasetCatalog.get("photos_test_test")
    assert tuple(MetadataCatalog.get("photos_test_test").thing_classes) == _CLASSES
    assert all((image["width"], image["height"]) == (80, 64) for image in images)
    assert cv2.imread(images[0]["file_name"]).shape == (64, 80, 3)
    truth = json.loads((out / "annotations" / "test.json").read_text())
    for image in truth["images"]:
        name = _CLASSES[image["sounds"][0]["category_id"] - 1]
        assert all(f.startswith(f"{name}/test/") for f in image["sounds"][0]["recordings"])
    files = json.loads((out / "ingredients.json").read_text())
    assert set(files) == {"train", "val", "test"} and set(files["val"]) == set(_KINDS)
    # Other ingredients do not mix into the folder.
    cv2.imwrite(str(tmp_path / "in/objects/cup/train/0.png"), _cutout("train", 2))
    with pytest.raises(SystemExit, match="other settings"):
        _run(monkeypatch, capsys, out, *options)
    with pytest.raises(SystemExit, match="--backgrounds must be given, too"):
        _run(monkeypatch, capsys, tmp_path / "other", *options[:4])
