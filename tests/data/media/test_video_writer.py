# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Tests of written videos: pictures and sound are there, and tell the same time.
"""

import av
import numpy as np
import pytest
from media_files import HEIGHT, WIDTH, decode_all, delay_of_sound, time_of_frame, write_video

from avdet2.data.media import video_writer
from avdet2.data.media.video import MediaError, MediaFile, probe, read_audio, read_frame
from avdet2.data.media.video_writer import VideoWriter


def copy(source, target):
    """
    Write a video's pictures again, with its sound.
    """
    with MediaFile(source) as media, VideoWriter(target, media.info().fps, source) as writer:
        for seconds, image in media.all_frames():
            writer.write(seconds, image)


def audio_packets(path):
    with av.open(str(path)) as container:
        return [bytes(p) for p in container.demux(container.streams.audio[0]) if p.size]


@pytest.mark.parametrize("ending", ["mp4", "mkv", "webm", "avi"])
def test_all_frames_come_in_order(tmp_path, ending):
    path = write_video(tmp_path / f"a.{ending}", seconds=2.0)
    with MediaFile(path) as media:
        times, images = zip(*media.all_frames())
    _, plain = decode_all(path)
    assert len(images) == len(plain)
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(images, plain))
    # AVI has no display times.
    slack = 0.1 if ending == "avi" else 0.02
    np.testing.assert_allclose(times, [time_of_frame(image) for image in images], atol=slack)


def test_times_start_at_zero_and_vary(tmp_path):
    stamps = [0.0, 0.04, 0.52, 0.56, 1.92]
    path = write_video(tmp_path / "a.mkv", seconds=2.0, start=3.0, frame_times=stamps)
    with MediaFile(path) as media:
        times = [seconds for seconds, _ in media.all_frames()]
    np.testing.assert_allclose(times, stamps, atol=0.001)


def test_damaged_frames_are_left_out(tmp_path):
    path = write_video(tmp_path / "a.mp4", seconds=4.0, gop=20)
    with av.open(path) as container:
        packet = [p for p in container.demux(video=0) if p.size][30]
    content = bytearray((tmp_path / "a.mp4").read_bytes())
    content[packet.pos + 8 : packet.pos + packet.size] = bytes(packet.size - 8)
    (tmp_path / "a.mp4").write_bytes(content)
    with MediaFile(path) as media:
        times, images = zip(*media.all_frames())
    assert 60 < len(images) < 100
    np.testing.assert_allclose(times, [time_of_frame(image) for image in images], atol=0.02)


def test_a_file_without_pictures_is_an_error(tmp_path):
    path = write_video(tmp_path / "a.mkv", seconds=1.0, codecs=(None, "flac"))
    with MediaFile(path) as media, pytest.raises(MediaError, match="no video stream"):
        next(media.all_frames())


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
@pytest.mark.parametrize("start", [0.0, 5.0])
def test_pictures_and_sound_stay_together(tmp_path, monkeypatch, codec, start):
    monkeypatch.setattr(video_writer, "_encoder", lambda: codec)
    source, target = write_video(tmp_path / "a.mkv", start=start), str(tmp_path / "b.mp4")
    copy(source, target)
    assert audio_packets(target) == audio_packets(source)
    info = probe(target)
    assert (info.width, info.height, round(info.fps)) == (WIDTH, HEIGHT, 25)
    assert info.duration == pytest.approx(4.0, abs=0.05)
    for seconds in (0.6, 2.0, 3.4):
        assert 0 <= seconds - time_of_frame(read_frame(target, seconds)) + 0.02 < 0.06
        assert abs(delay_of_sound(read_audio(target, seconds), seconds)) < 0.002


def test_sound_that_the_format_does_not_hold_is_encoded(tmp_path):
    source = write_video(tmp_path / "a.mkv", codecs=("libx264", "wavpack"), start=2.0)
    copy(source, tmp_path / "b.mp4")
    with av.open(str(tmp_path / "b.mp4")) as container:
        assert container.streams.audio[0].codec_context.name == "aac"
    for seconds in (0.6, 3.4):
        late = delay_of_sound(read_audio(source, seconds), seconds)
        again = delay_of_sound(read_audio(str(tmp_path / "b.mp4"), seconds), seconds)
        assert abs(again - late) < 0.03


def test_odd_sides_and_no_sound(tmp_path):
    source = write_video(tmp_path / "a.mp4", seconds=1.0, codecs=("libx264", None))
    path = tmp_path / "b.mp4"
    with VideoWriter(path, 0, source) as writer:
        # The second has the time of the first.
        for seconds, grey in [(0.0, 40), (0.0, 90), (0.2, 200)]:
            writer.write(seconds, np.full((65, 99, 3), grey, np.uint8))
    times, images = decode_all(str(path))
    assert [image.shape for image in images] == [(64, 98, 3)] * 3
    assert [round(float(image.mean())) for image in images] == pytest.approx([40, 90, 200], abs=3)
    assert times[0] < times[1] < times[2]
