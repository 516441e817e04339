# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Clips downloaded by yt-dlp from a server of made-up videos.
"""

import csv
import os
import sys
import threading
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from media_files import decode_all, time_of_frame, write_video
from prepare_scripts import run_script

from annotations import downloads
from annotations.downloads import Settings, download
from annotations.segments import Segment

pytest.importorskip("yt_dlp")

FIRST, SECOND, LOST, BROKEN = "-_a1b2c3d4e", "abcdefghij_", "ABCDEFGHIJK", "_broken__00"
# Cuts as the program does, by PyAV, where this machine has no FFmpeg.
FFMPEG = f"""#!{sys.executable}
import sys
args = sys.argv
if "-i" not in args:
    sys.exit(print("ffmpeg version 7.1"))
import av
assert "copy" not in args
start = float(args[args.index("-ss") + 1]) if "-ss" in args else 0.0
seconds = float(args[args.index("-t") + 1])
with (
    av.open(args[args.index("-i") + 1]) as source,
    av.open(args[-1].removeprefix("file:"), "w", format="mp4") as target,
):
    video, audio = target.add_stream("libx264", rate=25), target.add_stream("aac", rate=48000)
    video.width, video.height = source.streams.video[0].width, source.streams.video[0].height
    for frame in source.decode(video=0, audio=0):
        time = frame.time - start
        if 0 <= time < seconds:
            frame.pts = round(time / frame.time_base)
            target.mux((video if isinstance(frame, av.VideoFrame) else audio).encode(frame))
    for stream in (video, audio):
        target.mux(stream.encode(None))
# Also where nothing was encoded.
open(args[-1].removeprefix("file:"), "ab").close()
"""


class Handler(SimpleHTTPRequestHandler):
    asked = Counter()

    def send_head(self):
        name = self.path.partition(".")[0].strip("/")
        self.asked[name] += 1
        if name == BROKEN:
            return self.send_error(500)
        return super().send_head()

    def log_message(self, *args):
        pass


@pytest.fixture
def site(tmp_path, monkeypatch):
    """
    Address of a site with two videos of 4 s, and how often it was asked for what.
    """
    folder, programs = tmp_path / "site", tmp_path / "bin"
    folder.mkdir()
    programs.mkdir()
    write_video(folder / f"{FIRST}.mp4", muxer={"movflags": "faststart"})
    (folder / f"{SECOND}.mp4").write_bytes((folder / f"{FIRST}.mp4").read_bytes())
    (programs / "ffmpeg").write_text(FFMPEG)
    (programs / "ffmpeg").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    Handler.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/{{id}}.mp4"
        server.shutdown()


def _rows(path: Path) -> list[list[str]]:
    with open(path, newline="") as stream:
        return list(csv.reader(stream))


def test_only_the_annotated_seconds_and_each_once(site, tmp_path, monkeypatch, capsys):
    # Violin, flute, harp.
    (tmp_path / "segments.csv").write_text(
        f'{FIRST}, 1.000, 3.000, "/m/07y_7"\n{SECOND}, 2.000, 3.000, "/m/0l14j_"\n'
        f'{LOST}, 30.000, 40.000, "/m/03m5k"\n{SECOND}, 30.000, 40.000, "/m/03m5k"\n'
    )
    videos = tmp_path / "videos"
    words = ["audioset", "--csv", tmp_path / "segments.csv", "--videos", videos, "--sleep", 0]
    words += ["--address", site]
    run_script(monkeypatch, "download_clips.py", *words)
    for name, start, seconds in ((f"{FIRST}_000001", 1, 2), (f"{SECOND}_000002", 2, 1)):
        times, frames = decode_all(str(videos / f"{name}.mp4"))
        assert len(frames) == 25 * seconds
        assert time_of_frame(frames[0]) == pytest.approx(start, abs=0.05)
        assert time_of_frame(frames[-1]) == pytest.approx(start + seconds - 0.04, abs=0.05)
    (head, (name, reason), after_its_end) = _rows(videos / "missing.csv")
    assert head == ["id", "reason"] and name == f"{LOST}_000030" and "404" in reason
    assert after_its_end == [f"{SECOND}_000030", "the video has nothing at that time"]
    classes = {row[0]: row[1:] for row in _rows(videos / "classes.csv")}
    assert len(classes) == 5
    assert classes["Violin, fiddle"] == classes["Violin"] == ["1", "1", "0"]
    assert classes["Harp"] == ["2", "0", "2"]
    assert "2 clips there, 2 missing" in capsys.readouterr().out
    assert not [name for name in os.listdir(videos) if name.startswith(".part")]
    # Nothing is asked for twice, also not what is gone.
    before = Counter(Handler.asked)
    (videos / ".part_killed").mkdir()
    run_script(monkeypatch, "download_clips.py", *words)
    assert Handler.asked == before and not (videos / ".part_killed").exists()
    # The scripts that follow find the clips, and know the reason.
    output = tmp_path / "audioset"
    words = ["--segments", tmp_path / "segments.csv", "--videos", videos, "--output", output]
    run_script(monkeypatch, "prepare_audioset.py", *words)
    assert len(_rows(output / "lists" / "instruments_train.csv")) == 3
    assert _rows(output / "missing.csv")[1:] == [[f"{LOST}_000030", reason], after_its_end]


def test_whole_videos(site, tmp_path, monkeypatch):
    (tmp_path / "solo.json").write_text(f'{{"videos": {{"flute": ["{FIRST}", "{LOST}"]}}}}')
    videos = tmp_path / "videos"
    words = ["--csv", tmp_path / "solo.json", "--videos", videos, "--sleep", 0, "--address", site]
    run_script(monkeypatch, "download_clips.py", "music", *words)
    whole = (tmp_path / "site" / f"{FIRST}.mp4").read_bytes()
    assert (videos / f"{FIRST}.mp4").read_bytes() == whole
    output = tmp_path / "music"
    words = ["--solo", tmp_path / "solo.json", "--videos", videos, "--output", output]
    run_script(monkeypatch, "prepare_music_clips.py", *words)
    ((_, *_), (name, reason)) = _rows(output / "missing.csv")
    assert name == LOST and "404" in reason


def test_a_site_that_refuses_is_left_alone(site, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "MAX_FAILURES", 2)
    segments = [Segment(BROKEN, float(start), 1.0, ("flute",)) for start in range(5)]
    settings = Settings(site, sleep=0, retries=0)
    with pytest.raises(ValueError, match="last 2 videos have failed .*500.*Wait before"):
        download(segments, str(tmp_path / "videos"), settings)
    # Noted, and asked for again the next time.
    assert len(_rows(tmp_path / "videos" / "missing.csv")) == 3
    before = Handler.asked[BROKEN]
    with pytest.raises(ValueError, match="last 2 videos"):
        download(segments, str(tmp_path / "videos"), settings)
    assert Handler.asked[BROKEN] > before


def test_what_is_needed_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="no program `ffmpeg`"):
        download([], str(tmp_path / "videos"), Settings())


@pytest.mark.parametrize(
    ("message", "reason", "gone"),
    [
        ("ERROR: [youtube] abc: Private video. Sign in", "Private video. Sign in", True),
        ("\x1b[0;31mERROR:\x1b[0m [youtube] abc: Video unavailable", "Video unavailable", True),
        ("ERROR: [youtube] abc: Sign in to confirm you're not a bot", None, False),
        ("ERROR: unable to download video data: HTTP Error 403: Forbidden", None, False),
        ("", "failed without a reason", False),
    ],
)
def test_reasons(message, reason, gone):
    found = downloads._reason(message)
    assert reason is None or found == reason
    assert bool(downloads.GONE.search(found)) == gone
