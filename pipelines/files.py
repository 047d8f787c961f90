"""Output files that are either whole or absent, and text files that were given."""

import os
import tempfile
from collections.abc import Collection
from pathlib import Path


def check_writable(path: Path) -> None:
    """Raise OSError, in one line, unless a file can be put at `path`; leaves nothing behind."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder")
    try:
        with tempfile.TemporaryFile(dir=path.parent) as file:
            file.write(bytes(2**12))  # a full disk still takes files of which nothing is written
    except OSError as error:
        raise _refused(path, error) from error


def write_atomically(path: Path, data: bytes) -> None:
    """Put `data` at `path` in one step: an interrupted call leaves what was there before.

    Raises OSError, in one line, where there is no room for it or no file can be put there.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_bytes(data)
        unfinished.replace(path)
    except OSError as error:
        raise _refused(path, error) from error
    finally:
        unfinished.unlink(missing_ok=True)


def _refused(path: Path, error: OSError) -> OSError:
    return type(error)(f"cannot write {path}: {error.strerror or error}")


def read_text(path: Path, suffixes: Collection[str], what: str) -> str:
    """The text of a file of `what`, which comes with one of these suffixes, with or without a byte order mark.

    Raises ValueError for another suffix, or where it is not UTF-8, OSError where it cannot be read.
    """
    if path.suffix not in suffixes:
        raise ValueError(
            f"{path}: {what} come as {', '.join(suffixes)}, not {path.suffix or 'without a suffix'}"
        )
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}"
        ) from error
