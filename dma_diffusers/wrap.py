"""The wrapping of a stock attention processor, which keeps its projections, norms and RoPE."""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cache, partial
from typing import Any

import torch
from diffusers.hooks._helpers import AttentionProcessorRegistry
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    attention_backend,
)

from dma_diffusers.interception import Interception, ProcessorCall
from dma_diffusers.mode import InterceptionMode
from dma_diffusers.rebind import Rebound, can_rebind


class WrappedProcessor:
    """The base class that makes a stock processor's attention operations intercepted ones.

    A wrapped processor shares the attributes of `stock`, the processor that was wrapped: an attribute that is set on
    one of them is set on the other.
    """

    __slots__ = ()
    stock: Any
    interception: Interception

    @property
    def _attention_backend(self) -> AttentionBackendName:
        return AttentionBackendName.NATIVE  # the one backend that calls scaled_dot_product_attention

    @_attention_backend.setter
    def _attention_backend(self, backend: AttentionBackendName | None) -> None:
        self.__dict__["_attention_backend"] = backend  # for calls that the stock processor makes as a whole

    @property
    def _parallel_config(self) -> Any:
        return None

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        if config is not None:
            raise ValueError("DMA attention does not support context parallelism: restore the model first")

    def __reduce__(self):
        return wrap, (self.stock, self.interception)


def wrap(stock: Any, interception: Interception) -> WrappedProcessor:
    """`stock` with its attention operations handed to `interception`; `stock` itself is not changed."""
    kind: Any = type(stock)  # mypy does not take a type for hashable
    cls = _wrapped_class(kind)
    wrapped = cls.__new__(cls)
    object.__setattr__(wrapped, "__dict__", stock.__dict__)
    object.__setattr__(wrapped, "stock", stock)
    object.__setattr__(wrapped, "interception", interception)
    return wrapped


@cache
def _wrapped_class(stock: Any) -> Any:
    body = {"__slots__": ("interception", "stock"), "__call__": _call(stock), "__module__": __name__}
    wrapped = type(f"DMA{stock.__name__}", (WrappedProcessor, stock), body)
    with suppress(ValueError):  # Diffusers' guiders look processors up by class; not all stock ones are known
        AttentionProcessorRegistry.register(wrapped, AttentionProcessorRegistry.get(stock))
    return wrapped


def _call(stock: type):
    """Writes a `__call__` with the stock signature, as a real function.

    Attention modules filter their arguments by this signature, and torch.compile does not follow a
    `__signature__` attribute.
    """
    parameters = list(inspect.signature(stock.__call__).parameters.values())
    names = [parameter.name for parameter in parameters]
    defaults = {f"default_{p.name}": p.default for p in parameters if p.default is not p.empty}
    declared: list[str] = []
    passed: list[str] = []
    for p in parameters:
        star = "*" if p.kind is p.VAR_POSITIONAL else "**" if p.kind is p.VAR_KEYWORD else ""
        if p.kind is p.KEYWORD_ONLY and not any(d.startswith("*") for d in declared):
            declared.append("*")
        declared.append(f"{star}{p.name}" + (f"=default_{p.name}" if p.default is not p.empty else ""))
        passed.append(f"{p.name}={p.name}" if p.kind is p.KEYWORD_ONLY else f"{star}{p.name}")
    hidden = names[2]
    encoder = "encoder_hidden_states" if "encoder_hidden_states" in names else "None"
    native = _native if _takes_process_backend(stock) else nullcontext
    source = f"""
def __call__({", ".join(declared)}):
    if not is_compiling():
        return run({hidden}, {encoder}, {", ".join(passed)})
    if self.interception.all_fall_back({hidden}.device):
        return self.stock({", ".join(passed[1:])})
    with InterceptionMode(self.interception, {hidden}, {encoder}), native():
        return stock_call({", ".join(passed)})
"""
    namespace = {
        "InterceptionMode": InterceptionMode, "is_compiling": torch.compiler.is_compiling, "native": native,
        "run": partial(_run, stock.__call__, can_rebind(stock.__call__), native), "stock_call": stock.__call__,
    }  # fmt: skip
    namespace |= defaults
    exec(source, namespace)
    return namespace["__call__"]


def _run(
    stock_call: Any, by_name: bool, native: Callable[[], AbstractContextManager],
    hidden: torch.Tensor, encoder: torch.Tensor | None, wrapped: WrappedProcessor, *args: Any, **kwargs: Any,
) -> Any:  # fmt: skip
    """Calls a wrapped processor in eager mode. by_name: its attention can be intercepted by name."""
    interception = wrapped.interception
    if interception.all_fall_back(hidden.device):
        return wrapped.stock(*args, **kwargs)
    arguments = (*args, *kwargs.values())
    if interception.falls_back(hidden, arguments):
        with native():
            return stock_call(wrapped, *args, **kwargs)
    call: ProcessorCall
    if by_name and not interception.family.squares_masks:
        call = rebound = Rebound(interception, hidden, encoder)
        with native():
            result = rebound.run(stock_call, wrapped, *args, **kwargs)
    else:
        call = mode = InterceptionMode(interception, hidden, encoder)
        with mode, native():
            result = stock_call(wrapped, *args, **kwargs)
    interception.learn(hidden, arguments, call)
    return result


def _takes_process_backend(stock: type) -> bool:
    """Tells whether a processor has no backend of its own, and dispatches to that of the process."""
    return "dispatch_attention_fn" in stock.__call__.__code__.co_names and not hasattr(
        stock, "_attention_backend"
    )


def _native() -> AbstractContextManager:
    """Sets PyTorch's own backend for a processor that takes the process's backend, as those of Cosmos do."""
    if _AttentionBackendRegistry.get_active_backend()[0] is AttentionBackendName.NATIVE:
        return nullcontext()  # a graph cannot set it
    return attention_backend(AttentionBackendName.NATIVE)
