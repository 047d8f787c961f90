"""Tell by its weights whether a model in memory is the one that something was made for."""

import hashlib

import torch

from dma_diffusers.linears.module import QuantisedLinear

OTHER_WEIGHTS = (
    "the policy was chosen for other weights of this class: what it errs here is not known; calibrate anew"
)
_SAMPLED = 64  # so many numbers of each parameter tell models apart
_ADAPTER, _BASE = "lora_", ".base_layer."


def are_other_weights(model: torch.nn.Module, fingerprints: str | None) -> bool:
    """Say whether a model's weights are none of those with these fingerprints, as `DMAConfig.weights` has them."""
    own = fingerprint(model) if fingerprints else None
    return own is not None and own not in (fingerprints or "").split("+")


def fingerprint(model: torch.nn.Module) -> str | None:
    """Return the SHA-256 of a model's parameters: their names, shapes and first 64 numbers, rounded to bfloat16.

    The same weights have the same fingerprint in float32 and in bfloat16, on any device, and with or without LoRA
    adapters beside them, which are passed over. It is None where the stock weights are not at hand: on the meta device,
    or quantised.
    """
    if any(isinstance(module, QuantisedLinear) for module in model.modules()):
        return None
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if _ADAPTER in name:
            continue
        if parameter.is_meta or not _is_plain(parameter):
            return None
        digest.update(f"{name.replace(_BASE, '.')} {list(parameter.shape)}".encode())
        sample = parameter.detach().flatten()[:_SAMPLED]
        digest.update(sample.bfloat16().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _is_plain(parameter: torch.nn.Parameter) -> bool:
    """Say whether numbers are as they were trained; quantised ones are integers, FP8, or of a subclass."""
    is_wide = parameter.is_floating_point() and parameter.dtype.itemsize > 1
    return is_wide and type(parameter.data) is torch.Tensor
