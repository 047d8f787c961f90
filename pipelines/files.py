"""Write output files so that they are either whole or absent, and read the text files that a user gives."""

import codecs
import fcntl
import hashlib
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# An unfinished file or folder names the machine and the process that write it, and not its future name, with which it
# could become too long.
_MACHINE = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
_UNFINISHED = re.compile(r"\.unfinished-([0-9a-f]{8})-(\d+)-[0-9a-f]{8}\.tmp")


def check_writable(path: Path) -> None:
    """Check that a file can be written at `path`, and leave nothing behind; raises a one-line OSError if not."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {path.parent}")
    try:
        if path.is_dir():  # this raises for a name that is too long
            raise IsADirectoryError("it is a folder")
        with tempfile.TemporaryFile(dir=path.parent) as file:
            file.write(bytes(2**12))  # a full disk still accepts empty files
    except OSError as error:
        raise _refused(path, error) from error


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` in one step, so that an interrupted call leaves the former file as it was.

    The data is on the disk before the file has its name, so that a power cut leaves no empty file either. Raises a
    one-line OSError where there is no room for it or no file can be written there.
    """
    unfinished = _unfinished(path)
    try:
        unfinished.write_bytes(data)
        _flush(unfinished)
        unfinished.replace(path)
        with suppress(OSError):  # some file systems flush no folders
            _flush(path.parent)
    except OSError as error:
        raise _refused(path, error) from error
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Keep other commands out of a folder, on all machines that share it if its file system locks folders.

    Raises a one-line BlockingIOError where another command is in it.
    """
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(opened)
        raise BlockingIOError(
            f"another command works in {folder}: wait for it, or take another folder"
        ) from None
    except OSError:  # NFS locks no folders
        pass
    try:
        yield
    finally:
        os.close(opened)


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """Make a folder in `parent` that is removed in the end, or by the next run's `remove_leftovers`."""
    folder = _unfinished(parent / "folder")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove the unfinished files and folders that processes of this machine left in `folder` when they were killed."""
    for path in folder.iterdir():
        made_by = _UNFINISHED.fullmatch(path.name)
        if made_by and made_by[1] == _MACHINE and not _runs(int(made_by[2])):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _unfinished(path: Path) -> Path:
    digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:8]
    return path.with_name(f".unfinished-{_MACHINE}-{os.getpid()}-{digest}.tmp")


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        pass
    return True


def _refused(path: Path, error: OSError) -> OSError:
    return type(error)(f"cannot write {path}: {error.strerror or error}")


def files_below(folder: Path, above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Yield the files in a folder and in those below it, behind symbolic links too; links in a circle end.

    Args:
        above: the real paths of the folders that were entered on the way.
    """
    real = os.path.realpath(folder)
    if real in above or not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.is_dir():
            yield from files_below(path, above | {real})
        elif path.is_file():
            yield path


def read_text(path: Path, suffixes: Collection[str], what: str) -> str:
    """Return the text of a file in UTF-8, or in UTF-16 with a byte order mark, as spreadsheets write it.

    Args:
        suffixes: the suffixes that the file's name may have, in any case.
        what: names the contents in messages, as in "jobs".

    Raises ValueError for another suffix or another encoding, OSError where the file cannot be read.
    """
    if path.suffix.lower() not in suffixes:
        raise ValueError(
            f"{path}: {what} come as {', '.join(suffixes)}, not {path.suffix or 'without a suffix'}"
        )
    data = path.read_bytes()
    encoding = "UTF-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "UTF-8"
    try:
        return data.decode("utf-16" if encoding == "UTF-16" else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path} is not {encoding}: byte {error.start} is {data[error.start]:#04x}, in line {line}: "
            "save it as UTF-8"
        ) from error
