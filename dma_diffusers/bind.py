"""Wrapping a stock attention processor, which keeps its projections, norms and RoPE."""

import inspect
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cache
from typing import Any

from diffusers.hooks._helpers import AttentionProcessorRegistry
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    attention_backend,
)

from dma_diffusers.divert import Diversion, Diverting


class Bound:
    """Mixed into the class of a stock processor: the same processor, its attention operations diverted.

    It shares the attributes of `stock`, the processor that was wrapped: what is set on one is set on the other.
    """

    __slots__ = ()

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
        return bind, (self.stock, self.diversion)


def bind(stock: Any, diversion: Diversion) -> Bound:
    """`stock` with its attention operations handed to `diversion`; `stock` itself is not changed."""
    cls = _bound_class(type(stock))
    bound = cls.__new__(cls)
    object.__setattr__(bound, "__dict__", stock.__dict__)
    object.__setattr__(bound, "stock", stock)
    object.__setattr__(bound, "diversion", diversion)
    return bound


@cache
def _bound_class(stock: type) -> type:
    body = {"__slots__": ("diversion", "stock"), "__call__": _call(stock), "__module__": __name__}
    bound = type(f"DMA{stock.__name__}", (Bound, stock), body)
    with suppress(ValueError):  # Diffusers' guiders look processors up by class; not all stock ones are known
        AttentionProcessorRegistry.register(bound, AttentionProcessorRegistry.get(stock))
    return bound


def _call(stock: type):
    """A `__call__` with the stock signature, as a real function.

    Attention modules filter their arguments by this signature, and torch.compile does not follow a
    `__signature__` attribute.
    """
    parameters = list(inspect.signature(stock.__call__).parameters.values())
    names = [parameter.name for parameter in parameters]
    defaults = {f"default_{p.name}": p.default for p in parameters if p.default is not p.empty}
    declared, passed = [], []
    for p in parameters:
        star = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        if p.kind is p.KEYWORD_ONLY and not any(d.startswith("*") for d in declared):
            declared.append("*")
        declared.append(f"{star}{p.name}" + (f"=default_{p.name}" if p.default is not p.empty else ""))
        passed.append(f"{p.name}={p.name}" if p.kind is p.KEYWORD_ONLY else f"{star}{p.name}")
    hidden = names[2]
    encoder = "encoder_hidden_states" if "encoder_hidden_states" in names else "None"
    dispatches = "dispatch_attention_fn" in stock.__call__.__code__.co_names
    context = ", _native()" if dispatches and not hasattr(stock, "_attention_backend") else ""
    source = f"""
def __call__({", ".join(declared)}):
    if self.diversion.leaves_all({hidden}.device):
        return self.stock({", ".join(passed[1:])})
    with Diverting(self.diversion, {hidden}, {encoder}){context}:
        return stock_call({", ".join(passed)})
"""
    namespace = {"Diverting": Diverting, "_native": _native, "stock_call": stock.__call__, **defaults}
    exec(source, namespace)
    return namespace["__call__"]


def _native() -> AbstractContextManager:
    """PyTorch's own backend for a processor that has none of its own and takes the process's, as Cosmos' do."""
    if _AttentionBackendRegistry.get_active_backend()[0] is AttentionBackendName.NATIVE:
        return nullcontext()  # a graph cannot set it
    return attention_backend(AttentionBackendName.NATIVE)
