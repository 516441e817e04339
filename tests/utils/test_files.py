# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
import hashlib
import os
import signal
import subprocess
import sys

import pytest

from avdet2.utils.files import locked, sha256_of_file, write_whole


def test_a_file_is_written_whole(tmp_path):
    target = tmp_path / "a.json"
    with write_whole(target) as part:
        assert part.suffix == ".json" and part.parent == tmp_path
        part.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.json"]


def test_an_error_leaves_the_old_file(tmp_path):
    target = tmp_path / "a.json"
    target.write_text("old")
    with pytest.raises(OSError, match="disk full"), write_whole(target) as part:
        part.write_text("half")
        raise OSError("disk full")
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_killed_process_leaves_the_old_file(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    program = (
        "import os, signal, sys\n"
        "from avdet2.utils.files import write_whole\n"
        "with write_whole(sys.argv[1]) as part:\n"
        "    part.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(target)])
    assert ended.returncode == -signal.SIGKILL and target.read_text() == "old"


@pytest.mark.parametrize("size", [0, 3, (1 << 20) + 1])
def test_the_hash_is_that_of_the_contents(tmp_path, size):
    content = os.urandom(size)
    (tmp_path / "a").write_bytes(content)
    assert sha256_of_file(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_a_lock_is_held_by_one_and_ends_with_its_process(tmp_path):
    lock = tmp_path / "lock"
    program = (
        "import sys, time\n"
        "from avdet2.utils.files import locked\n"
        "with locked(sys.argv[1], 'taken'):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(600)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", program, str(lock)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="another run is at work"):
            with locked(lock, "another run is at work"):
                pass
    finally:
        holder.kill()
        holder.wait()
    with locked(lock, "another run is at work"):
        pass
