"""The wrapping of a stock attention processor, which keeps its projections, norms and RoPE."""

import inspect
from contextlib import suppress
from functools import cache, partial
from inspect import Parameter
from typing import Any

import torch

from dma_diffusers import unmet
from dma_diffusers.fused import can_fuse, without_change
from dma_diffusers.interception import Interception, ProcessorCall
from dma_diffusers.internals import AttentionBackendName, AttentionProcessorRegistry
from dma_diffusers.mode import InterceptionMode
from dma_diffusers.parallel import Spread
from dma_diffusers.rebind import Rebound, can_rebind

NO_COMPILED_RING = "ring attention is not compiled: use Ulysses, or compile without fullgraph"
NO_RING_HERE = "a ring needs a stock processor that asks for attention by name: use Ulysses"


class WrappedProcessor:
    """The base class that makes a stock processor's attention operations intercepted ones.

    stock: the processor that was wrapped.
    """

    __slots__ = ()
    stock: Any
    interception: Interception

    def __reduce__(self):
        return wrap, (self.stock, self.interception)


class DelegatingProcessor(WrappedProcessor):
    """A wrapped processor whose attributes are those of `stock`, which is a function, or has no `__dict__` to share."""

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "stock"), name)


def wrap(stock: Any, interception: Interception) -> WrappedProcessor:
    """`stock` with its attention operations handed to `interception`; `stock` itself is not changed.

    The wrapped processor is of a subclass and shares the attributes of `stock`: an attribute that is set on one of them
    is set on the other. Functions and objects with `__slots__` are called by a `DelegatingProcessor` instead.
    Raises ValueError for what is no processor.
    """
    kind: Any = type(stock)  # mypy does not take a type for hashable
    cls = _wrapped_class(kind)
    wrapped = object.__new__(cls)
    if not issubclass(cls, DelegatingProcessor):
        object.__setattr__(wrapped, "__dict__", stock.__dict__)
    object.__setattr__(wrapped, "stock", stock)
    object.__setattr__(wrapped, "interception", interception)
    return wrapped


@cache
def _wrapped_class(kind: Any) -> Any:
    name = f"DMA{kind.__name__}"
    if not _can_share_attributes(kind):
        return type(name, (DelegatingProcessor,), {"__call__": _call(kind, _of_stock)})

    # Diffusers makes processors of the class of those that it finds, and sets them on a model.
    def new(cls, *args, **kwargs):
        return kind(*args, **kwargs)

    body = {"__slots__": ("interception", "stock"), "__module__": __name__, "__new__": new}
    body["__call__"] = _call(kind, kind.__call__)
    # A class that names a backend insists on it, and one without the attribute takes the process's.
    if getattr(kind, "_attention_backend", "") is None:
        body["_attention_backend"] = property(_native_backend, _keep_backend)
    wrapped = type(name, (WrappedProcessor, kind), body)
    with suppress(ValueError):  # Diffusers' guiders look processors up by class; not all stock ones are known
        AttentionProcessorRegistry.register(wrapped, AttentionProcessorRegistry.get(kind))
    return wrapped


def _can_share_attributes(kind: type) -> bool:
    """Tells whether an object of a subclass can have the `__dict__` of one of `kind`."""
    try:
        object.__new__(type("Subclass", (kind,), {}))
    except TypeError:  # for functions and other types that are not written in Python
        return False
    return kind.__dictoffset__ != 0


def _native_backend(self) -> AttentionBackendName:
    return AttentionBackendName.NATIVE  # the one backend that calls scaled_dot_product_attention


def _keep_backend(self, backend: AttentionBackendName | None) -> None:
    self.__dict__["_attention_backend"] = backend  # for calls that the stock processor makes as a whole


def _of_stock(wrapped: WrappedProcessor, *args: Any, **kwargs: Any) -> Any:
    return wrapped.stock(*args, **kwargs)


def _call(kind: type, stock_call: Any):
    """Writes a `__call__` with the stock signature, as a real function.

    Attention modules filter their arguments by this signature, and torch.compile does not follow a
    `__signature__` attribute.
    """
    parameters = list(inspect.signature(kind.__call__).parameters.values())
    hidden, encoder = _tokens_given(kind, parameters)
    declared: list[str] = []
    passed: list[str] = []
    for p in parameters:
        star = "*" if p.kind is p.VAR_POSITIONAL else "**" if p.kind is p.VAR_KEYWORD else ""
        if p.kind is p.KEYWORD_ONLY and not any(d.startswith("*") for d in declared):
            declared.append("*")
        declared.append(f"{star}{p.name}" + (f"=default_{p.name}" if p.default is not p.empty else ""))
        passed.append(f"{p.name}={p.name}" if p.kind is p.KEYWORD_ONLY else f"{star}{p.name}")
    self = parameters[0].name
    stock, find_change = f"stock_call({', '.join(passed)})", "change = None"
    if can_fuse(kind):
        stock = f"stock_call({self}, *arguments)"
        find_change = (
            f"change, arguments = without_change({self}.interception, stock_call, {', '.join(passed[1:])})\n"
            "    if spread is not None:\n"
            f"        change, arguments = None, ({', '.join(passed[1:])})"
        )
    source = f"""
def __call__({", ".join(declared)}):
    hidden = {hidden}
    encoder = tokens({encoder}, hidden)
    if not is_compiling():
        return run(hidden, encoder, {", ".join(passed)})
    spread = spread_of({self})
    if spread is not None and spread.ring > 1:
        return uncompiled_run(hidden, encoder, {", ".join(passed)})
    if {self}.interception.all_fall_back(hidden.device):
        return {self}.stock({", ".join(passed[1:])})
    reasons = []
    {find_change}
    with InterceptionMode({self}.interception, hidden.shape[1], encoder, spread, reasons, change):
        result = {stock}
    if not reasons:
        forward = {self}.interception.forward
        met_none_in_graph(forward.number, forward.model, processor_name)
    return result
"""
    run = partial(_run, stock_call, can_rebind(stock_call), can_fuse(kind))
    namespace = {
        "InterceptionMode": InterceptionMode, "is_compiling": torch.compiler.is_compiling, "tokens": _tokens,
        "run": run, "stock_call": stock_call, "without_change": without_change, "spread_of": _spread_of,
        "uncompiled_run": torch.compiler.disable(run, reason=NO_COMPILED_RING),
        "met_none_in_graph": unmet.met_none_in_graph, "processor_name": unmet.name_of(kind),
    }  # fmt: skip
    namespace |= {f"default_{p.name}": p.default for p in parameters if p.default is not p.empty}
    exec(source, namespace)
    return namespace["__call__"]


def _tokens_given(kind: type, parameters: list[Parameter]) -> tuple[str, str]:
    """Expressions for the `hidden_states` and the `encoder_hidden_states` among the parameters of a `__call__`."""
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(named) > 2:  # self, attn, hidden_states
        return named[2], "encoder_hidden_states" if "encoder_hidden_states" in named else "None"
    rest = {p.kind: p.name for p in parameters if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    if len(rest) < 2:
        raise ValueError(
            f"{unmet.name_of(kind)} is no attention processor: it must be called with (attn, "
            "hidden_states, encoder_hidden_states=None, …), by these names or as *args, **kwargs"
        )
    args, kwargs = rest[Parameter.VAR_POSITIONAL], rest[Parameter.VAR_KEYWORD]
    first = 2 - len(named)  # the place of hidden_states among `args`
    places = ((first, "hidden_states"), (first + 1, "encoder_hidden_states"))
    hidden, encoder = (
        f"({args}[{place}] if len({args}) > {place} else {kwargs}.get('{name}'))" for place, name in places
    )
    return hidden, encoder


def _tokens(encoder: torch.Tensor | None, hidden: torch.Tensor) -> int:
    """The number of tokens of `encoder_hidden_states`; 0 for none, or for self-attention that is given them twice."""
    return 0 if encoder is None or encoder is hidden else encoder.shape[1]


def _run(
    stock_call: Any, by_name: bool, fuses: bool, hidden: torch.Tensor, encoder: int, wrapped: WrappedProcessor,
    *args: Any, **kwargs: Any,
) -> Any:  # fmt: skip
    """Calls a wrapped processor in eager mode.

    by_name: its attention can be intercepted by name. fuses: the operator can take over its norm and its RoPE.
    """
    interception, spread = wrapped.interception, _spread_of(wrapped)
    if interception.all_fall_back(hidden.device):
        return _run_stock(wrapped, spread, args, kwargs)
    arguments = (*args, *kwargs.values(), spread and spread.gpus)
    if interception.falls_back(hidden, arguments):
        return (
            stock_call(wrapped, *args, **kwargs)
            if spread is None
            else _run_stock(wrapped, spread, args, kwargs)
        )
    call: ProcessorCall
    if by_name and not interception.family.squares_masks:
        backend = getattr(wrapped.stock, "_attention_backend", None)
        change = None
        if fuses and spread is None:
            change, args = without_change(interception, stock_call, *args)
        call = rebound = Rebound(interception, hidden.shape[1], encoder, backend, change)
        result = rebound.run(stock_call, wrapped, *args, **kwargs)
    elif spread is not None and spread.ring > 1:
        interception.fall_back(NO_RING_HERE)
        return _run_stock(wrapped, spread, args, kwargs)
    else:
        call = mode = InterceptionMode(interception, hidden.shape[1], encoder, spread)
        with mode:
            result = stock_call(wrapped, *args, **kwargs)
    if not call.reasons:
        interception.met_no_attention(unmet.name_of(wrapped.stock))
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
