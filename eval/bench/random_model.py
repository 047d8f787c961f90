"""This module makes models of true size with random weights, for measuring speed."""

from collections.abc import Mapping
from typing import Any

import torch

# Scores of normalised random q and k have a standard deviation of 1, and the softmax of so many is a plain mean: with
# 3, as trained models have it, each query attends to a few keys, and a result tells which.
_SHARPNESS = 3.0


def random_model(kind: str, config: Mapping[str, Any], device: torch.device, seed: int) -> torch.nn.Module:
    """Make a model of Diffusers with PyTorch's initial weights, in the dtypes that `from_pretrained` gives bf16.

    kind: the class's name. config: what differs from its defaults. The model is made on `device`.
    """
    import diffusers

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.random.fork_rng(), device:
            torch.manual_seed(seed)
            model = getattr(diffusers, kind)(**config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    in_fp32 = set(model._keep_in_fp32_modules or ())
    for name, parameter in model.named_parameters():
        if in_fp32 & set(name.split(".")):
            parameter.data = parameter.data.float()
        if name.endswith("norm_q.weight"):
            parameter.data.fill_(_SHARPNESS)
    return model
