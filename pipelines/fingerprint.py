"""Tell models and files apart by what they hold, wherever they lie."""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import try_to_load_from_cache

from dma_diffusers.config import DMAConfig
from dma_diffusers.linears.methods import is_file
from dma_diffusers.pipelines.files import files_below

# Weights in these formats are never loaded, and the other files are no part of a model.
_NOT_LOADED = {".bin", ".ckpt", ".h5", ".md", ".msgpack", ".onnx", ".pt", ".pth"}


def model_fingerprint(model: str | Path) -> str:
    """Return a digest of all that a pipeline is loaded from: its index, and the files of its components.

    Components may be symbolic links. The same files have the same digest under any path. Of a hub's model, which may
    not be here yet, it is the id and the commit.

    Args:
        model: a local folder, or a hub id of which at least the index was fetched.

    Raises OSError where a file cannot be read.
    """
    folder = Path(model)
    if not folder.is_dir():
        index = try_to_load_from_cache(str(model), "model_index.json")
        return f"{model}@{Path(index).parent.name}" if isinstance(index, str) else str(model)
    digest = hashlib.sha256()
    for path in [folder / "model_index.json", *files_of_components(folder)]:
        digest.update(f"{path.relative_to(folder).as_posix()} {file_fingerprint(path)}\n".encode())
    return digest.hexdigest()


def file_fingerprint(path: Path) -> str:
    """Return the SHA-256 of a file's bytes; raises OSError where it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def config_identity(config: DMAConfig) -> dict[str, Any]:
    """Return the fields of a configuration, with a digest in the place of the path of a file of linear layers."""
    fields = asdict(config)
    if config.linears and is_file(config.linears):
        fields["linears"] = file_fingerprint(Path(config.linears))
    return fields


def files_of_components(folder: Path) -> Iterator[Path]:
    """Yield the files from which the components of a pipeline's folder are loaded, in a fixed order."""
    index = DiffusionPipeline.load_config(folder)
    components = sorted(name for name, value in index.items() if isinstance(value, list | tuple))
    for component in components:
        paths = files_below(folder / component)
        yield from sorted(p for p in paths if p.suffix not in _NOT_LOADED and not p.name.startswith("."))
