"""Gradient checkpoints: a block that runs anew during a backward pass sees the facts of the call that it belongs to."""

from collections.abc import Callable
from typing import Any, Protocol

import torch


class Context(Protocol):
    """A `ForwardContext`, as far as it is needed here."""

    @property
    def call(self) -> Any: ...


class Carrying:
    """A model's gradient checkpointing function, whose blocks carry the facts of the model's call with them.

    The backward pass runs them outside of that call, perhaps in a thread of its own, and after other calls.
    """

    def __init__(self, checkpoint: Callable, context: Context):
        self.checkpoint = checkpoint
        self.context = context

    def __call__(self, block: Callable, *args: Any, **kwargs: Any) -> Any:
        facts = dict(vars(self.context.call))

        def run(*args: Any, **kwargs: Any) -> Any:
            call = self.context.call
            if call.is_running:
                return block(*args, **kwargs)
            own = dict(vars(call))
            vars(call).update(facts)
            try:
                return block(*args, **kwargs)
            finally:
                vars(call).update(own)

        return self.checkpoint(run, *args, **kwargs)


def carry(model: torch.nn.Module, context: Context) -> None:
    """Lets the checkpointing functions of a model carry the facts of its calls."""
    module: Any  # mypy takes what is set on a module for a tensor
    for module in model.modules():
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)
        if isinstance(checkpoint, Carrying):
            checkpoint.context = context
        elif checkpoint is not None:
            module._gradient_checkpointing_func = Carrying(checkpoint, context)


def let_go(model: torch.nn.Module) -> None:
    """Gives a model its own checkpointing functions back."""
    module: Any
    for module in model.modules():
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)
        if isinstance(checkpoint, Carrying):
            module._gradient_checkpointing_func = checkpoint.checkpoint
