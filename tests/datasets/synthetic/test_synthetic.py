# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The synthetic benchmark holds what it says: exact boxes, the shares of scenes, sounds that tell the
class by timbre and not by pitch, files that can be read, and the same content for the same seed.
"""

import csv
import json
import runpy
import shutil
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from pycocotools.coco import COCO
from scipy.stats import ks_2samp

from avdet2.data.datasets.synthetic import CLASS_GROUPS, CLASS_NAMES, class_names
from synthetic import writer
from synthetic.generator import (
    Settings,
    make_item,
    plan_test_image,
    plan_training_clip,
)
from synthetic.materials import DIFFICULTIES, Drawings
from synthetic.scenes import MIN_VISIBLE, Scene, draw_scene, render
from synthetic.sounds import (
    LOWEST_PITCH,
    PITCH_OCTAVES,
    SAMPLE_RATE,
    draw_pitch,
    mix,
    synthesize,
)
from synthetic.sprites import Sprite, class_hue, draw_object
from synthetic.views import TEST_VIEWS

_SCRIPT = Path(__file__).resolve().parents[3] / "datasets" / "prepare_synthetic.py"
_SMALL = Settings(size=64)
# Frames are the slow part: where only the truth is looked at, there are few small ones.
_TINY = Settings(size=32, seconds=1.0, fps=2)


def _prepare(monkeypatch, capsys, root, *options):
    argv = [str(_SCRIPT), "--output", str(root), "--clips", "6", "--val", "2", "--test", "4"]
    monkeypatch.setattr(sys, "argv", argv + ["--size", "64", *map(str, options)])
    runpy.run_path(str(_SCRIPT), run_name="__main__")
    made, digest = capsys.readouterr().out.strip().splitlines()[-2:]
    return int(made.split()[0]), digest.split()[-1]


@pytest.fixture(scope="module")
def small_set(tmp_path_factory):
    root = tmp_path_factory.mktemp("synthetic")
    writer.open_output(root, _SMALL)
    counts = {"train": 6, "val": 2, "test": 4}
    for split, count in counts.items():
        for index in range(count):
            assert writer.write_item(root, _SMALL, split, index)
    return root, writer.write_annotations(root, _SMALL, counts)


def test_same_arguments_same_content():
    first, again = make_item(_SMALL, "train", 3), make_item(_SMALL, "train", 3)
    assert np.array_equal(first.frames, again.frames)
    assert np.array_equal(first.waveform, again.waveform)
    assert first.truth == again.truth
    others = [
        make_item(Settings(size=64, seed=1), "train", 3),
        make_item(_SMALL, "train", 4),
        make_item(_SMALL, "val", 3),
        make_item(_SMALL, "test", 3),
    ]
    digests = {item.truth["digest"] for item in [first, *others]}
    assert len(digests) == 5


def test_script_in_two_processes_gives_same_content(small_set, tmp_path, monkeypatch, capsys):
    root, digest = small_set
    assert _prepare(monkeypatch, capsys, tmp_path, "--workers", 2) == (12, digest)
    files = [path for path in root.rglob("*") if path.is_file()]
    assert len(files) > 30
    for path in files:
        assert (tmp_path / path.relative_to(root)).read_bytes() == path.read_bytes(), path


def test_script_makes_only_what_is_missing(small_set, tmp_path, monkeypatch, capsys):
    root, digest = small_set
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    (tmp_path / "train" / "000002.mp4").unlink()
    (tmp_path / "test" / "000001.jpg").write_bytes(b"half a pic")
    record = tmp_path / ".records" / "val" / "000000.json"
    record.write_text(record.read_text()[:40])
    untouched = (tmp_path / "train" / "000001.mp4").stat().st_mtime_ns
    assert _prepare(monkeypatch, capsys, tmp_path, "--workers", 1) == (3, digest)
    assert (tmp_path / "train" / "000001.mp4").stat().st_mtime_ns == untouched
    for name in ("train/000002.mp4", "test/000001.jpg", "annotations/val.json"):
        assert (tmp_path / name).read_bytes() == (root / name).read_bytes()
    # Nothing half-written is left, and other settings do not mix into the folder.
    assert not list(tmp_path.rglob("*.part*"))
    with pytest.raises(SystemExit, match="other settings"):
        _prepare(monkeypatch, capsys, tmp_path, "--seed", 5)


def _painted_box(scene, index, frame):
    # What a layer contributes to the picture, seen by painting it white and all else black.
    layers = []
    for i, layer in enumerate(scene.layers):
        color = np.full_like(layer.sprite.rgb, 255.0 if i == index else 0.0)
        sprite = Sprite(color, layer.sprite.alpha, layer.sprite.category)
        layers.append(type(layer)(sprite, layer.track, layer.instance))
    mask = render(Scene(np.zeros_like(scene.background), layers), frame)[..., 0] >= 128
    rows, columns = np.nonzero(mask)
    x, y = columns.min(), rows.min()
    return [x, y, columns.max() - x + 1, rows.max() - y + 1], mask.sum()


@pytest.mark.parametrize("difficulty", sorted(DIFFICULTIES))
def test_boxes_are_tight_around_visible_pixels(difficulty):
    settings = Settings(classes=12, size=96, difficulty=difficulty, fps=2)
    seen = 0
    for index in range(12):
        item = make_item(settings, "test", index)
        objects = {entry["instance"]: entry for entry in item.truth["objects"]}
        for i, layer in enumerate(item.scene.layers):
            if layer.instance < 0:
                continue
            entry = objects[layer.instance]
            box, area = _painted_box(item.scene, i, settings.key_frame)
            assert entry["box"] == box and entry["area"] == area
            assert entry["track"][0] == _painted_box(item.scene, i, 0)[0]
            assert entry["category"] == layer.sprite.category
            seen += 1
    assert seen >= 15


def test_objects_are_inside_the_frame_and_a_quarter_hidden_at_most():
    settings = Settings(size=64, difficulty="hard", fps=4)
    hidden = 0
    for index in range(30):
        for entry in make_item(settings, "test", index).truth["objects"]:
            assert entry["least_visible"] >= MIN_VISIBLE
            hidden += entry["least_visible"] < 1
            low, high = DIFFICULTIES["hard"].sizes
            for x, y, width, height in entry["track"]:
                assert 0 <= x and 0 <= y and x + width <= 64 and y + height <= 64
                assert max(width, height) <= high * 64 + 1
            assert max(entry["box"][2:]) >= MIN_VISIBLE * low * 64 - 1
    assert hidden > 0


def test_objects_move_slowly():
    tracks = [
        layer.track
        for index in range(8)
        for layer in make_item(_SMALL, "train", index).scene.layers
    ]
    steps = np.concatenate([np.abs(np.diff(track, axis=0)).max(axis=1) for track in tracks])
    ways = [np.ptp(track, axis=0).max() for track in tracks]
    assert steps.max() <= 2 and 0.02 * 64 < np.mean(ways) < 0.2 * 64


def test_shares_of_training_clips():
    rng = np.random.default_rng(0)
    plans = [plan_training_clip(Settings(), rng) for _ in range(4000)]
    silent = [plan for plan in plans if len(plan[0]) == 2]
    assert abs(len(silent) / 4000 - 0.4) < 0.03
    assert all(
        shown[0] != shown[1] and sounding == [True, False] and heard == shown[:1]
        for shown, sounding, heard in silent
    )
    counts = np.bincount([heard[0] for _, _, heard in plans], minlength=6) / 4000
    assert np.abs(counts - 1 / 6).max() < 0.03

    plans = [plan_training_clip(Settings(difficulty="hard"), rng) for _ in range(4000)]
    empty = np.mean([not shown for shown, _, _ in plans])
    two = np.mean([sounding == [True, True] for _, sounding, _ in plans])
    hidden = np.mean(
        [sounding == [False] and heard[0] not in shown for shown, sounding, heard in plans]
    )
    assert np.allclose([empty, two, hidden], DIFFICULTIES["hard"].odd_clips, atol=0.02)


def test_shares_of_test_images():
    rng = np.random.default_rng(1)
    plans = [plan_test_image(Settings(), rng) for _ in range(4000)]
    counts = np.bincount([len(shown) for shown, _, _ in plans], minlength=4) / 4000
    assert np.allclose(counts, [0, 0.40, 0.35, 0.25], atol=0.03)
    assert all(sum(sounding) == 1 and heard == shown[:1] for shown, sounding, heard in plans)
    repeats = np.mean([len(set(shown)) < len(shown) for shown, _, _ in plans if len(shown) > 1])
    assert 0.2 < repeats < 0.7


def test_depth_does_not_tell_which_object_sounds():
    sounding = [
        entry["sounding"]
        for index in range(40)
        for entry in make_item(_TINY, "test", index).truth["objects"]
        if entry["instance"] == 0
    ]
    assert 0.4 < np.mean(sounding) < 0.95


def test_pitch_does_not_tell_the_class():
    sounds = [
        sound for index in range(120) for sound in make_item(_TINY, "val", index).truth["sounds"]
    ]
    octaves = np.log2([sound["pitch"] / LOWEST_PITCH for sound in sounds])
    classes = np.array([sound["category"] for sound in sounds])
    assert octaves.min() >= 0 and octaves.max() <= PITCH_OCTAVES and np.ptp(octaves) > 2
    for category in range(6):
        mine = classes == category
        assert mine.sum() > 5
        assert ks_2samp(octaves[mine], octaves[~mine]).pvalue > 0.002


def _log_bands(waveform):
    # Level and movement in 24 bands of equal width in log frequency, for frames of 43 ms.
    frames = waveform[: len(waveform) // 1024 * 1024].reshape(-1, 1024) * np.hanning(1024)
    power = np.abs(np.fft.rfft(frames, axis=1)) ** 2
    edges = np.geomspace(3, 512, 25).round().astype(int)
    bands = np.log(
        np.stack(
            [power[:, a : max(b, a + 1)].sum(axis=1) for a, b in zip(edges, edges[1:])], axis=1
        )
        + 1
    )
    bands -= bands.mean()
    change = np.diff(bands, axis=0).std(axis=0)
    return np.concatenate([bands.mean(axis=0), bands.std(axis=0), change])


def test_timbre_tells_the_class():
    linear_model = pytest.importorskip("sklearn.linear_model")
    features, pitches, classes = [], [], []
    for category, name in enumerate(class_names(6)):
        for index in range(24):
            rng = np.random.default_rng([category, index])
            pitch = draw_pitch(rng)
            sound = mix([synthesize(name, pitch, 1.0, rng)], 1.0, rng).astype(np.float64)
            features.append(_log_bands(sound))
            pitches.append([np.log2(pitch)])
            classes.append(category)
    classes, train = np.array(classes), np.arange(len(classes)) % 2 == 0
    accuracy = []
    for values in (np.array(features), np.array(pitches)):
        values = (values - values.mean(axis=0)) / values.std(axis=0)
        model = linear_model.LogisticRegression(C=0.1, max_iter=500)
        model.fit(values[train], classes[train])
        accuracy.append(model.score(values[~train], classes[~train]))
    assert accuracy[0] > 0.6 and accuracy[1] < 0.35


@pytest.mark.parametrize("name", CLASS_NAMES)
def test_sound_is_there_in_every_second_at_its_level(name):
    rng = np.random.default_rng(7)
    sound = synthesize(name, draw_pitch(rng), 3.0, rng)
    assert sound.shape == (3 * SAMPLE_RATE,) and np.isclose(np.mean(sound**2), 1, atol=1e-3)
    for start in np.arange(0, 2.01, 0.25):
        window = sound[int(start * SAMPLE_RATE) :][:SAMPLE_RATE]
        assert np.mean(window**2) > 0.1
    mixed = mix([sound], 3.0, rng)
    assert mixed.dtype == np.int16 and 32767 * 10 ** (-19 / 20) < np.abs(mixed).max() < 32767
    # The least-squares share of the sound in the mixture leaves the noise.
    scale = mixed @ sound.astype(np.float64) / (sound @ sound)
    noise = 10 * np.log10(np.mean((mixed / scale - sound) ** 2))
    assert -30.5 < noise < -11.5


def test_notes_stay_near_their_pitch():
    rng = np.random.default_rng(0)
    sound = synthesize("horn", 440.0, 3.0, rng)
    power = np.abs(np.fft.rfft(sound))
    low = np.fft.rfftfreq(len(sound), 1 / SAMPLE_RATE) < 600
    # The melody moves by three semitones at most.
    assert abs(12 * np.log2(power[low].argmax() / 3.0 / 440.0)) < 3.5


def test_colour_cue_is_weak_and_only_for_easy():
    def share_near_class_hue(cue):
        near = []
        for index in range(60):
            drawing = draw_object(0, 96, np.random.default_rng(index), cue)
            solid = drawing[drawing[..., 3] == 255][:, :3].astype(float)
            # The class "ring" has the hue 0: red.
            main = np.median(solid, axis=0)
            near.append(main.argmax() == 0 and main[0] > 1.4 * main[1:].max())
        return np.mean(near)

    assert class_hue(0) == 0
    assert 0.6 < share_near_class_hue(True) < 0.95 and share_near_class_hue(False) < 0.35


def test_objects_and_scenes_of_every_class_can_be_drawn():
    rng, level = np.random.default_rng(0), DIFFICULTIES["normal"]
    material = Drawings(CLASS_NAMES, level)
    for shown in ([0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]):
        layers = draw_scene(shown, (96, 96), 2, level, material, rng).layers
        categories = {layer.instance: layer.sprite.category for layer in layers}
        assert [categories[instance] for instance in range(4)] == shown


def _decoded(path):
    with av.open(str(path)) as container:
        frames = [(float(f.time), f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]
    with av.open(str(path)) as container:
        sound = [(f.pts, f.to_ndarray()[0]) for f in container.decode(audio=0)]
    return frames, sound


@pytest.mark.parametrize("codec", ["h264", "mpeg4"])
def test_picture_and_sound_of_an_mp4_are_aligned(tmp_path, monkeypatch, codec):
    if codec == "mpeg4":
        monkeypatch.setattr(writer.av, "codecs_available", {"mpeg4", "aac"})
    elif "libx264" not in av.codecs_available:
        pytest.skip("no h264 encoder")
    frames = np.zeros((24, 64, 64, 3), np.uint8)
    frames[12] = 255
    audio = np.zeros(72000, np.int16)
    audio[36000:36100] = 20000
    writer.write_video(tmp_path / "clip.mp4", frames, audio, 8, SAMPLE_RATE)
    decoded, sound = _decoded(tmp_path / "clip.mp4")
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert container.streams.video[0].codec_context.name == codec
        assert container.streams.video[0].codec_context.has_b_frames == 0
        assert abs(container.duration / 1e6 - 3.0) < 0.06
    assert np.allclose([time for time, _ in decoded], np.arange(24) / 8, atol=1e-3)
    brightness = np.array([picture.mean() for _, picture in decoded])
    assert brightness.argmax() == 12 and brightness[12] > 200
    assert np.delete(brightness, 12).max() < 60
    first = sound[0][0]
    wave = np.concatenate([samples for _, samples in sound])
    assert abs(first + np.abs(wave).argmax() - 36050) < 120


def test_files_hold_what_was_generated(small_set):
    root, _ = small_set
    item = make_item(_SMALL, "test", 1)
    frames, sound = _decoded(root / "test" / "000001.mp4")
    assert len(frames) == 24
    picture = dict(frames)[item.truth["time"]].astype(int)
    assert np.abs(picture - item.frames[12]).mean() < 12
    wave = np.concatenate([samples for _, samples in sound])[:72000]
    assert np.corrcoef(wave, item.waveform[: len(wave)])[0, 1] > 0.8


def test_clip_list_and_annotations(small_set):
    root, _ = small_set
    with open(root / "train.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    truth = json.loads((root / "annotations" / "train_assessment.json").read_text())
    names = {entry["id"]: entry["name"] for entry in truth["categories"]}
    assert list(names.values()) == list(class_names(6)) and len(rows) == 6
    for row, image in zip(rows, truth["images"]):
        assert (root / row["file"]).is_file() and Path(row["file"]).name == image["file_name"]
        assert (float(row["start"]), float(row["duration"])) == (0.0, 3.0)
        heard = [a for a in truth["annotations"] if a["image_id"] == image["id"] and a["sounding"]]
        assert [names[a["category_id"]] for a in heard] == [row["label"]]

    coco = COCO(str(root / "annotations" / "test.json"))
    for image in coco.loadImgs(coco.getImgIds()):
        assert (root / "test" / image["file_name"]).is_file()
        assert (root / "test" / image["audio_file"]).is_file() and image["time"] == 1.5
        annotations = coco.loadAnns(coco.getAnnIds(image["id"]))
        assert 1 <= len(annotations) <= 3
        assert [a["sounding"] for a in annotations].count(1) == 1
        for annotation in annotations:
            assert annotation["bbox"] == annotation["track"][12]
            assert 0 < annotation["area"] <= np.prod(annotation["bbox"][2:])


def test_impossible_settings():
    for wrong in (
        {"classes": 13},
        {"size": 63},
        {"size": (160, 31)},
        {"seconds": 0.5},
        {"difficulty": "odd"},
        {"seed": -1},
    ):
        with pytest.raises(ValueError, match="give|at least"):
            Settings(**wrong)


def test_registered_data_sets(small_set):
    pytest.importorskip("detectron2")
    from detectron2.data import DatasetCatalog, MetadataCatalog

    from avdet2.data.datasets.synthetic import register_synthetic

    root, _ = small_set
    register_synthetic(str(root), "synthetic_test")
    images = DatasetCatalog.get("synthetic_test_test")
    assert len(images) == 4
    for image in images:
        assert Path(image["audio_file"]).is_file() and Path(image["file_name"]).is_file()
        assert image["time"] == 1.5 and sum(a["sounding"] for a in image["annotations"]) == 1
    metadata = MetadataCatalog.get("synthetic_test_test")
    assert tuple(metadata.thing_classes) == class_names(6) and metadata.evaluator_type == "coco"
    clips = DatasetCatalog.get("synthetic_test_train")
    assert tuple(MetadataCatalog.get("synthetic_test_train").label_classes) == class_names(6)
    with open(root / "train.csv", newline="") as f:
        labels = [row["label"] for row in csv.DictReader(f)]
    assert [class_names(6)[clip["label"]] for clip in clips] == labels
    assert [clip["sample_id"] for clip in clips] == list(range(6))
    assert all((clip["width"], clip["height"]) == (64, 64) for clip in clips)


def test_all_data_sets_are_documented():
    pytest.importorskip("detectron2")
    from detectron2.data import DatasetCatalog

    import avdet2.data.datasets.builtin  # noqa: F401

    text = (Path(__file__).resolve().parents[3] / "datasets" / "README.md").read_text()
    names = [name for name in DatasetCatalog.list() if name.startswith("synthetic_av_")]
    assert len(names) == 3 + len(TEST_VIEWS)
    assert not [name for name in names if f"`{name}`" not in text]


def test_registration_does_not_need_the_data(tmp_path):
    pytest.importorskip("detectron2")
    from detectron2.data import DatasetCatalog

    from avdet2.data.datasets.synthetic import register_synthetic

    register_synthetic(str(tmp_path / "absent"), "synthetic_absent")
    for split in ("train", "val", "test"):
        with pytest.raises(FileNotFoundError, match="prepare_synthetic.py"):
            DatasetCatalog.get(f"synthetic_absent_{split}")


def test_other_looks_at_the_test_images():
    def entry(image, category, **others):
        return {"image_id": image, "category_id": category, "sounding": 0, **others}

    names = ("star", "guitar", "ring")
    truth = {
        "info": {},
        "categories": [{"id": i, "name": name} for i, name in enumerate(names, start=1)],
        "images": [{"id": i, "sounds": []} for i in (1, 2, 3)],
        "annotations": [entry(1, 3), entry(2, 1), entry(2, 2)],
    }
    before = json.dumps(truth)
    single, multi, groups = (look(truth) for look in TEST_VIEWS.values())
    # An image without objects is in neither.
    assert [image["id"] for image in single["images"]] == [1]
    assert single["annotations"] == [entry(1, 3)]
    assert [image["id"] for image in multi["images"]] == [2]
    assert multi["annotations"] == [
        {"image_id": 2, "category_id": 1},
        {"image_id": 2, "category_id": 2},
    ]
    assert groups["categories"] == [{"id": 1, "name": "shape"}, {"id": 2, "name": "strings"}]
    assert groups["annotations"] == [entry(1, 1), entry(2, 1), entry(2, 2)]
    assert [image["id"] for image in groups["images"]] == [1, 2, 3]
    assert json.dumps(truth) == before


def test_every_class_has_a_group():
    assert set(CLASS_GROUPS) == set(CLASS_NAMES)
    # A group must not be taken for a label.
    assert not set(CLASS_GROUPS.values()) & set(CLASS_NAMES)
