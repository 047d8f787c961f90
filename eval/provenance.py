"""This module says what a measurement was made with, which tells whether a stored one still holds."""

import hashlib
import importlib
import platform
from collections.abc import Sequence
from pathlib import Path

import torch

import dma_diffusers
from dma_diffusers.fingerprint import fingerprint as fingerprint_of

# A picture depends on the versions of these packages.
PACKAGES = ("dma_diffusers", "torch", "diffusers", "transformers")


def fingerprint(folder: Path, *patterns: str) -> str:
    """Return the SHA-256 of the names and bytes of a folder's files that match any of `patterns`."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        digest.update(str(path.relative_to(folder)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def weights_fingerprint(*models: torch.nn.Module) -> str:
    """Return the models' fingerprints as `DMAConfig.weights` has them; that of unknown weights is empty."""
    return "+".join(fingerprint_of(model) or "" for model in models)


def adapters_fingerprint(*models: torch.nn.Module) -> str | None:
    """Return a digest of the LoRA adapters of models, of their weights and of what is active; None for none."""
    digest, found = hashlib.sha256(), False
    for model in models:
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                found = True
                sample = parameter.detach().flatten()[:64]
                digest.update(name.encode() + sample.bfloat16().float().cpu().numpy().tobytes())
        for name, module in model.named_modules():
            if isinstance(scaling := getattr(module, "scaling", None), dict):
                active = getattr(module, "active_adapters", None)
                digest.update(f"{name} {sorted(scaling.items())} {active}".encode())
    return digest.hexdigest() if found else None


def sources() -> dict[str, str]:
    """Return fingerprints of the code that decides what attention and linear layers compute."""
    package = Path(dma_diffusers.__file__).parent
    kernels = next(
        Path(root) / "kernels" for root in dma_diffusers.__path__ if (Path(root) / "kernels").is_dir()
    )
    return {
        "dma_diffusers": fingerprint(package, "*.py", "linears/*.py"),
        "kernels": fingerprint(kernels, "**/*.py"),
    }


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Return the versions of Python and of `packages`."""
    found = {name: importlib.import_module(name).__version__ for name in packages}
    return {"python": platform.python_version()} | found


def hardware() -> str:
    """Return the GPU's name, or the processor's architecture where there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
