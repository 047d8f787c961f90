"""Test that output files are either whole or absent."""

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from dma_diffusers.pipelines import files
from dma_diffusers.pipelines.files import (
    check_writable,
    exclusive,
    remove_leftovers,
    temporary_folder,
    write_atomically,
)


def test_writes_and_replaces(tmp_path):
    target = tmp_path / "out.png"
    write_atomically(target, b"first")
    write_atomically(target, b"second")
    assert target.read_bytes() == b"second"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("step", ["write_bytes", "replace"])
def test_interrupted_write_leaves_what_was_there(tmp_path, monkeypatch, step):
    target = tmp_path / "out.png"
    target.write_bytes(b"before")

    def interrupted(self, argument):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(target, b"after")
    assert target.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [target]


def test_check_writable_leaves_nothing(tmp_path):
    check_writable(tmp_path / "out.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["missing/out.png", ".", "/proc/out.png"])
def test_check_writable_refuses_in_one_line(tmp_path, target):
    with pytest.raises(OSError, match=r"^cannot write [^\n]+$"):
        check_writable(tmp_path / target)


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    target = tmp_path / "out.mp4"
    write = Path.write_bytes

    def full(self, data):
        write(self, data[:3])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"^cannot write \S+out\.mp4: No space left on device$"):
        write_atomically(target, b"a clip")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_noticed_before(tmp_path, monkeypatch):
    """/dev/full can be opened, but nothing can be written to it."""
    with Path("/dev/full").open("wb", buffering=0) as full:
        monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: full)
        with pytest.raises(OSError, match=r"^cannot write \S+out\.mp4: No space left on device$"):
            check_writable(tmp_path / "out.mp4")


def test_a_name_as_long_as_can_be_is_written(tmp_path):
    target = tmp_path / ("ä" * 125 + "a.png")
    assert len(os.fsencode(target.name)) == 255
    check_writable(target)
    write_atomically(target, b"picture")
    assert target.read_bytes() == b"picture" and list(tmp_path.iterdir()) == [target]


def test_a_name_that_is_too_long_is_refused_before(tmp_path):
    with pytest.raises(OSError, match=r"^cannot write [^\n]+: File name too long$"):
        check_writable(tmp_path / ("a" * 252 + ".png"))


def test_data_is_on_the_disk_before_the_file_has_its_name(tmp_path, monkeypatch):
    seen = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda number: (seen.append(os.fstat(number).st_size), fsync(number)))
    monkeypatch.setattr(Path, "replace", lambda self, to: (seen.append("named"), replace(self, to)))
    write_atomically(tmp_path / "a.png", b"picture")
    assert seen[:2] == [len(b"picture"), "named"] and len(seen) == 3  # the last is the folder


def test_what_a_killed_process_left_is_removed(tmp_path):
    """Files and folders of a process that is gone; others' are left alone."""
    leave = (
        "import os, sys; from pathlib import Path; from dma_diffusers.pipelines import files;"
        "files._unfinished(Path(sys.argv[1]) / 'a.png').write_bytes(b'cut');"
        "left = files.temporary_folder(Path(sys.argv[1])); (left.__enter__() / 'x').touch(); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", leave, str(tmp_path)], check=False)
    assert len(list(tmp_path.iterdir())) == 2
    kept = [tmp_path / "a.png", tmp_path / ".hidden.tmp", files._unfinished(tmp_path / "b.png")]
    for path in kept:
        path.write_bytes(b"whole")
    elsewhere = tmp_path / ".unfinished-00000000-1-00000000.tmp"  # of another machine
    elsewhere.mkdir()
    remove_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([*kept, elsewhere])


def test_a_temporary_folder_is_removed_in_the_end(tmp_path):
    with pytest.raises(KeyError), temporary_folder(tmp_path) as folder:
        (folder / "a").touch()
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_a_command_that_is_terminated_removes_what_it_began(tmp_path):
    begin = (
        "import os, signal, sys, time; from pathlib import Path; from dma_diffusers import cli;"
        "from dma_diffusers.pipelines.files import temporary_folder\n"
        "def app():\n"
        " with temporary_folder(Path(sys.argv[1])):\n"
        "  os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)\n"
        "cli.app = app; cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", begin, str(tmp_path)], check=False, timeout=120)
    assert done.returncode == 128 + 15 and not list(tmp_path.iterdir())


def test_two_commands_in_one_folder_refuse_each_other(tmp_path):
    with exclusive(tmp_path):
        words = f"^another command works in {tmp_path}: wait for it"
        with pytest.raises(BlockingIOError, match=words), exclusive(tmp_path):
            pass
        (tmp_path / "other").mkdir()
        with exclusive(tmp_path / "other"):
            pass
    with exclusive(tmp_path):
        assert list(tmp_path.iterdir()) == [tmp_path / "other"]


def test_a_file_system_that_locks_no_folders_will_do(tmp_path, monkeypatch):
    def refuses(opened, how):
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr("fcntl.flock", refuses)
    with exclusive(tmp_path), exclusive(tmp_path):
        pass
