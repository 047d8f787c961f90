"""Diffusers' caches, which keep what a model computed in earlier steps."""

from typing import Any

import torch

from dma_diffusers.internals import StateManager


def empty_caches(model: Any) -> None:
    """Empties the caches of a model within a call, which goes on under the same cache context.

    Caches that count steps begin to count anew.
    """
    hooks = [hook for module in _hooked(model) for hook in module._diffusers_hook.hooks.values()]
    if not any(hook._is_stateful for hook in hooks):
        return
    managers = [value for hook in hooks for value in vars(hook).values() if isinstance(value, StateManager)]
    contexts = [manager._context for manager in managers]
    model._reset_stateful_cache()
    for manager, context in zip(managers, contexts, strict=True):
        manager.set_context(context)


def _hooked(model: torch.nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "_diffusers_hook")]
