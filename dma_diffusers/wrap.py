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
from dma_diffusers.parallel import Spread
from dma_diffusers.rebind import Rebound, can_rebind

NO_COMPILED_RING = "ring attention is not compiled: use Ulysses, or compile without fullgraph"
NO_RING_HERE = "a ring needs a stock processor that asks for attention by name: use Ulysses"


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
    spread = spread_of(self)
    if spread is not None and spread.ring > 1:
        return uncompiled_run({hidden}, {encoder}, {", ".join(passed)})
    if self.interception.all_fall_back({hidden}.device):
        return self.stock({", ".join(passed[1:])})
    with InterceptionMode(self.interception, {hidden}, {encoder}, spread), native():
        return stock_call({", ".join(passed)})
"""
    run = partial(_run, stock.__call__, can_rebind(stock.__call__), native)
    namespace = {
        "InterceptionMode": InterceptionMode, "is_compiling": torch.compiler.is_compiling, "native": native,
        "run": run, "stock_call": stock.__call__, "spread_of": _spread_of,
        "uncompiled_run": torch.compiler.disable(run, reason=NO_COMPILED_RING),
    }  # fmt: skip
    namespace |= defaults
    exec(source, namespace)
    return namespace["__call__"]


def _run(
    stock_call: Any, by_name: bool, native: Callable[[], AbstractContextManager],
    hidden: torch.Tensor, encoder: torch.Tensor | None, wrapped: WrappedProcessor, *args: Any, **kwargs: Any,
) -> Any:  # fmt: skip
    """Calls a wrapped processor in eager mode. by_name: its attention can be intercepted by name."""
    interception, spread = wrapped.interception, _spread_of(wrapped)
    if interception.all_fall_back(hidden.device):
        return _run_stock(wrapped, spread, args, kwargs)
    arguments = (*args, *kwargs.values(), spread and spread.gpus)
    if interception.falls_back(hidden, arguments):
        if spread is not None:
            return _run_stock(wrapped, spread, args, kwargs)
        with native():
            return stock_call(wrapped, *args, **kwargs)
    call: ProcessorCall
    if by_name and not interception.family.squares_masks:
        call = rebound = Rebound(
            interception, hidden, encoder, getattr(wrapped.stock, "_attention_backend", None)
        )
        with native():
            result = rebound.run(stock_call, wrapped, *args, **kwargs)
    elif spread is not None and spread.ring > 1:
        interception.fall_back(NO_RING_HERE)
        return _run_stock(wrapped, spread, args, kwargs)
    else:
        call = mode = InterceptionMode(interception, hidden, encoder, spread)
        with mode, native():
            result = stock_call(wrapped, *args, **kwargs)
    interception.learn(hidden, arguments, call)
    return result


def _run_stock(wrapped: WrappedProcessor, spread: Spread | None, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Calls the stock processor, with its own backend."""
    if spread is not None:
        spread.check_backend(getattr(wrapped.stock, "_attention_backend", None))
    return wrapped.stock(*args, **kwargs)


def _spread_of(wrapped: WrappedProcessor) -> Spread | None:
    parallel_config = getattr(wrapped, "_parallel_config", None)
    return Spread.of(parallel_config, wrapped.interception.forward.splits_text)


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
