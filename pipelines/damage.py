"""Name the file of a model that is damaged, where a library's error would not."""

import json
from pathlib import Path

from dma_diffusers.pipelines.fingerprint import files_of_components

_POINTER = b"version https://git-lfs"
_NEVER_EMPTY = {".json", ".model", ".safetensors"}


def check_files(folder: Path) -> None:
    """Raise ValueError, naming the file, for one that is empty, or a pointer of Git LFS in the place of a file.

    Some libraries would take a pointer for a small vocabulary.
    """
    for path in files_of_components(folder):
        size = path.stat().st_size
        if not size and path.suffix in _NEVER_EMPTY:
            raise ValueError(f"{path} is empty: fetch it again")
        if size < 1024 and path.read_bytes().startswith(_POINTER):
            raise ValueError(f"{path} is a pointer of Git LFS, not the file itself: run `git lfs pull` there")


def damaged_file(folder: Path) -> str:
    """Return words for the first file of a model that holds no JSON though its name says so; empty if there is none."""
    for path in files_of_components(folder):
        if path.suffix == ".json":
            try:
                json.loads(path.read_bytes())
            except ValueError as error:
                return f"{path} is not JSON: {error}"
    return ""
