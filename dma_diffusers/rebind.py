"""Stock processors with the names by which they ask for attention bound to an interception, for one call.

A function mode sees every function of PyTorch, which costs microseconds for each; a name costs nothing. So in eager
mode a stock processor's code runs with a copy of its module's global names, in which `dispatch_attention_fn` and
`F.scaled_dot_product_attention` are those of the call. Nothing outside the call changes.
"""

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch.nn import functional

from dma_diffusers.code_names import names_in
from dma_diffusers.interception import Change, Interception
from dma_diffusers.internals import AttentionBackendName, dispatch_attention_fn
from dma_diffusers.parallel import Spread


class Rebound:
    """One call of a stock processor whose attention is asked for by name; a `ProcessorCall`.

    hidden, encoder: the numbers of tokens of the `hidden_states` and `encoder_hidden_states` that the module was given.
    backend: its own backend, for calls that stock attention runs in another way than PyTorch's.
    change: what the operator is to do to q and k first.
    """

    spread: Spread | None = None  # no `scaled_dot_product_attention` is inside Diffusers' context parallelism

    def __init__(
        self,
        interception: Interception,
        hidden: int,
        encoder: int,
        backend: Any = None,
        change: Change | None = None,
    ):
        self.interception = interception
        self.backend = backend
        self.change = change
        self.hidden = hidden
        self.encoder = encoder
        self.reasons: list[str] = []

    def run(self, function: FunctionType, *args: Any, **kwargs: Any) -> Any:
        """Calls `function`, of which `can_rebind` must be true, with its attention operations intercepted."""
        names = function.__globals__ | {"dispatch_attention_fn": self.dispatch, "F": _Functional(self)}
        rebound = FunctionType(
            function.__code__, names, function.__name__, function.__defaults__, function.__closure__
        )
        rebound.__kwdefaults__ = function.__kwdefaults__
        return rebound(*args, **kwargs)

    def attention(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Stands in for `scaled_dot_product_attention`."""
        return self.interception.attention(self, *args, **kwargs)

    def dispatch(
        self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False,
        attention_kwargs=None, *, backend=None, parallel_config=None,
    ):  # fmt: skip
        """Stands in for `dispatch_attention_fn`, and does as its native backend does; q, k and v are `[B, S, H, D]`."""
        if backend in (None, AttentionBackendName.NATIVE) and not isinstance(attn_mask, torch.Tensor | None):
            backend = self.backend  # for a block mask, of which the native one knows nothing
        if spread := Spread.of(parallel_config, self.interception.forward.splits_text):
            return self.interception.spread_attention(
                self, spread, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, attention_kwargs
            )  # fmt: skip
        if backend not in (None, AttentionBackendName.NATIVE):
            self.reasons.append(self.interception.fall_back(f"its processor asks for the backend {backend}"))
            return dispatch_attention_fn(
                query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, attention_kwargs,
                backend=backend, parallel_config=parallel_config,
            )  # fmt: skip
        if isinstance(attn_mask, torch.Tensor) and attn_mask.shape == (query.shape[0], key.shape[1]):
            attn_mask = attn_mask[:, None, None]
        heads_first = (x.permute(0, 2, 1, 3) for x in (query, key, value))
        out = self.attention(*heads_first, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        return out.permute(0, 2, 1, 3)


class _Functional:
    """`torch.nn.functional` with the attention of a call."""

    def __init__(self, call: Rebound):
        self.scaled_dot_product_attention = call.attention

    def __getattr__(self, name: str) -> Any:
        return getattr(functional, name)


def can_rebind(function: Callable) -> bool:
    """Tells whether a stock processor's `__call__` asks for attention by no other names than `Rebound` binds."""
    if not isinstance(function, FunctionType) or not function.__module__.startswith("diffusers."):
        return False
    names, known = set(names_in(function.__code__)), function.__globals__
    if known.get("F", functional) is not functional or "functional" in names:
        return False
    if "dispatch_attention_fn" in names:
        return known.get("dispatch_attention_fn") is dispatch_attention_fn
    return {"F", "scaled_dot_product_attention"} <= names
