"""Write output files so that they are either whole or absent, and read the text files that a user gives."""

import codecs
import os
import tempfile
from collections.abc import Collection
from pathlib import Path


def check_writable(path: Path) -> None:
    """Check that a file can be written at `path`, and leave nothing behind; raises a one-line OSError if not."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder")
    try:
        with tempfile.TemporaryFile(dir=path.parent) as file:
            file.write(bytes(2**12))  # a full disk still accepts empty files
    except OSError as error:
        raise _refused(path, error) from error


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` in one step, so that an interrupted call leaves the former file as it was.

    Raises a one-line OSError where there is no room for it or no file can be written there.
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
