"""Diffusers' caches, which keep what a model computed in earlier steps."""

from typing import Any

import torch

from dma_diffusers.internals import StateManager


def empty_caches(model: torch.nn.Module) -> None:
    """Empties the caches of a model within a call, which goes on under the same cache context.

    Caches that count steps begin to count anew.
    """
    for module in model.modules():
        registry = getattr(module, "_diffusers_hook", None)
        for hook in () if registry is None else registry.hooks.values():
            if hook._is_stateful:
                _empty(hook, module)


def _empty(hook: Any, module: torch.nn.Module) -> None:
    managers = [value for value in vars(hook).values() if isinstance(value, StateManager)]
    contexts = [manager._context for manager in managers]
    hook.reset_state(module)
    for manager, context in zip(managers, contexts, strict=True):
        manager.set_context(context)
