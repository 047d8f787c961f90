"""The transformer that is trained, and the size of the pictures that its pipeline is asked for."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DiffusionPipeline

from dma_diffusers.config import DMAConfig
from dma_diffusers.pipelines.load import arguments


def trainable(pipe: DiffusionPipeline, component: str, lora: bool) -> torch.nn.Module:
    """Return a component of the pipeline that gradients can reach.

    Raises ValueError where there is none of this name, its weights are quantised, it has no room on the GPU, or the
    pipeline can't save the adapters that are wanted.
    """
    kind = type(pipe).__name__
    model = pipe.components.get(component)
    if not isinstance(model, torch.nn.Module):
        named = [name for name in pipe.components if name.startswith("transformer")]
        instead = f"give --component {' or '.join(named)}" if named else "there is nothing here to fine-tune"
        raise ValueError(f"{kind} has no {component}: {instead}")
    quantised = [name for name, value in model.named_parameters() if not _is_plain(value)]
    if quantised:
        raise ValueError(
            f"the weights of {component} are quantised ({quantised[0]}): load the model in bfloat16"
        )
    if any(hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook") for module in model.modules()):
        raise ValueError(f"{component} has no room on this GPU beside the rest of {kind}: take a larger GPU")
    if lora and not hasattr(pipe, "save_lora_weights"):
        raise ValueError(f"{kind} can't save LoRA adapters: leave --lora-rank out, to train all weights")
    return model


def _is_plain(value: torch.Tensor) -> bool:
    """Tell whether these are numbers of 16 bits or more; torchao's weights are tensors of a class of their own."""
    return value.is_floating_point() and value.itemsize > 1 and type(value.data) is torch.Tensor


def with_size(pipe: DiffusionPipeline, call: Mapping[str, Any]) -> dict[str, Any]:
    """Return the call with the width and height that the pipeline takes by default, where it has none."""
    sides = {}
    for name in ("width", "height"):
        default = arguments(type(pipe))[name].default
        sides[name] = call.get(name) or default or pipe.default_sample_size * pipe.vae_scale_factor
    return {**call, **sides}


def depends_on_noise(config: DMAConfig | None) -> bool:
    """Tell whether a model may run otherwise at another noise level, so that a batch must have a single one."""
    if config is None:
        return False
    configs = (config, *(config.of_module(name) for name in dict(config.modules)))
    return any(
        len(each.entries) > 1 or (each.asked.leaves_out and each.dense_above_sigma != 1) for each in configs
    )
