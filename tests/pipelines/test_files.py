"""Test that output files are either whole or absent."""

import errno
import os
import tempfile
from pathlib import Path

import pytest

from dma_diffusers.pipelines.files import check_writable, write_atomically


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
