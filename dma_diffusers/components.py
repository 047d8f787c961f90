"""The transformers of a pipeline, inside whatever wraps them, and their attention modules."""

from types import CodeType
from typing import Any

import torch

from dma_diffusers.code_names import names_in

_ATTENTION = {"scaled_dot_product_attention", "dispatch_attention_fn", "flex_attention"}
_HOMES = ("diffusers.models.transformers.", "diffusers.models.controlnets.")


def transformers_of(pipe_or_model: Any) -> list[tuple[str, torch.nn.Module]]:
    """(prefix of module names, model) of a model, or of each transformer and ControlNet of a pipeline.

    Raises TypeError for anything else, ValueError for a pipeline without a transformer.
    """
    if isinstance(pipe_or_model, torch.nn.Module):
        return [("", unwrapped(pipe_or_model))]
    components = getattr(pipe_or_model, "components", None)
    if not isinstance(components, dict):
        kind = type(pipe_or_model).__name__
        raise TypeError(f"expected a Diffusers pipeline or a transformer, got {kind}")
    found = [
        (f"{name}.", unwrapped(component))
        for name, component in components.items()
        if isinstance(component, torch.nn.Module)
        and (name.startswith("transformer") or type(unwrapped(component)).__module__.startswith(_HOMES))
    ]
    if not found:
        raise ValueError(f"{type(pipe_or_model).__name__} has no transformer")
    return found


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside the wrappers of torch.compile, PEFT, and data parallelism."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]  # an attribute like any other
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()  # type: ignore[operator]
        elif isinstance(model, torch.nn.DataParallel | torch.nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def attention_modules(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """(name, module) of the attention modules that have a processor, in module order."""
    return [(name, m) for name, m in model.named_modules() if callable(getattr(m, "processor", None))]


def without_processor(model: torch.nn.Module) -> list[str]:
    """The names of modules that attend in their own `forward`, where no processor can be put."""
    return [
        name
        for name, m in model.named_modules()
        if not hasattr(m, "processor") and _attends(getattr(type(m).forward, "__code__", None))
    ]


def device_of(model: torch.nn.Module, module: torch.nn.Module) -> torch.device:
    """The device on which a module of `model` will run: that to which hooks of accelerate move it, else its own."""
    for holder in (module, model):
        for part in holder.modules():
            hook = getattr(part, "_hf_hook", None)
            for each in getattr(hook, "hooks", [hook]):
                device = getattr(each, "execution_device", None)
                if device is not None:
                    return torch.device(device)
    return next((p.device for p in (*module.parameters(), *model.parameters())), torch.device("cpu"))


def _attends(code: CodeType | None) -> bool:
    return code is not None and not _ATTENTION.isdisjoint(names_in(code))
