"""Stock attention runs in the fastest full-precision kernel that is there, eager as well as inside compiled graphs."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from diffusers.models import attention_dispatch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from dma_diffusers.errors import first_line
from dma_diffusers.eval.bench.bound import Gpu
from dma_diffusers.eval.bench.entries import FULL
from dma_diffusers.eval.bench.inputs import draw
from dma_diffusers.eval.bench.peers import PEERS, Peer
from dma_diffusers.eval.bench.shapes import Shape
from dma_diffusers.eval.bench.timing import take_turns

_PROBE_SECONDS = 0.3
_DISPATCHER = "dispatch_attention_fn"
# PyTorch's kernels that take the calls which the chosen one can't, such as those with a mask.
_OTHERS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def _sdpa_flash(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v)


@dataclass(frozen=True)
class Backend:
    """A backend is a full-precision kernel. sdpa: PyTorch's name of it; None for kernels of others."""

    peer: Peer
    sdpa: SDPBackend | None = None

    def running(self) -> AbstractContextManager:
        """Return a context in which models attend by this kernel where it can be."""
        if self.sdpa is not None:
            others = [each for each in _OTHERS if each is not self.sdpa]
            return sdpa_kernel([self.sdpa, *others], set_priority=True)
        return _standing_in(self.peer.name)


_SDPA = {"cuDNN SDPA bf16": SDPBackend.CUDNN_ATTENTION}
BACKENDS = (
    *(Backend(peer, _SDPA.get(peer.name)) for peer in PEERS if peer.kind == FULL),
    Backend(
        Peer("FlashAttention-2 SDPA bf16", FULL, "H", "H", ("torch",), "torch", _sdpa_flash),
        SDPBackend.FLASH_ATTENTION,
    ),
)


class LargestCall(TorchFunctionMode):
    """It sees the attention calls of an eager step made inside it.

    shape: of the largest call; raises ValueError where there was none. dispatched: tells if Diffusers' dispatcher made
    that call, so that a kernel of others can stand in for it.
    """

    def __init__(self):
        super().__init__()
        self._calls: list[tuple[Shape, bool]] = []

    @property
    def shape(self) -> Shape:
        return self._largest[0]

    @property
    def dispatched(self) -> bool:
        return self._largest[1]

    @property
    def _largest(self) -> tuple[Shape, bool]:
        if not self._calls:
            raise ValueError(
                "the model makes no call of scaled_dot_product_attention: there is nothing to compare"
            )
        return max(self._calls, key=lambda call: call[0].flop)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query, key = (*args, *(kwargs[name] for name in ("query", "key") if name in kwargs))[:2]
            batch, heads, _, head_dim = query.shape
            shape = Shape("", batch, heads, key.shape[-2], head_dim)
            self._calls.append((shape, sys._getframe(1).f_code.co_filename == attention_dispatch.__file__))
        return func(*args, **kwargs)


def fastest_backend(
    shape: Shape, gpu: Gpu, seed: int, known: Sequence[Backend] = BACKENDS
) -> tuple[dict[str, Any], Backend]:
    """Time an attention call in each of the backends; return their times, or why they are absent, and the fastest.

    Raises ValueError where none runs.
    """
    # Models lay tokens out as `[B, S, H, D]`.
    copy = [
        x.transpose(1, 2).contiguous().transpose(1, 2) for x in draw(shape, "normal", seed, gpu.l2_bytes)[0]
    ]
    found: dict[str, Any] = {}
    calls = {}
    for backend in known:
        peer = backend.peer
        try:
            call = partial(peer.call, peer.load(), *copy)
            call()
            calls[backend] = lambda number, call=call: call()
        except Exception as error:  # a peer may fail in whatever way it likes
            torch.cuda.synchronize()  # raises, and ends the run, if the device is lost to all
            found[peer.name] = {"absent": first_line(error)}
    if not calls:
        raise ValueError("no backend of stock attention runs here: see `bench attention`")
    taken = take_turns(calls, _PROBE_SECONDS)
    found |= {backend.peer.name: times for backend, times in taken.items()}
    return found, min(taken, key=lambda backend: taken[backend]["ms"])


@torch.library.custom_op("dma_diffusers_bench::attention", mutates_args=())
def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, peer: str) -> torch.Tensor:
    """Compute attention, `[B, S, H, D]` in and out, by the peer of this name; one node of a compiled graph."""
    (chosen,) = (each for each in PEERS if each.name == peer)
    heads_first = (x.transpose(1, 2) for x in (query, key, value))
    return chosen.call(chosen.load(), *heads_first).transpose(1, 2).contiguous()


@_attention.register_fake
def _attention_fake(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, peer: str) -> torch.Tensor:
    return query.new_empty(query.shape)


@contextmanager
def _standing_in(peer: str) -> Iterator[None]:
    """Let a peer stand in for Diffusers' dispatcher, in every module of Diffusers' that asks for it by name."""
    modules = [
        module for name, module in list(sys.modules.items())
        if name.startswith("diffusers.models.") and hasattr(module, _DISPATCHER)
    ]  # fmt: skip
    with ExitStack() as patches:
        for module in modules:
            patches.enter_context(patch.object(module, _DISPATCHER, _dispatcher(peer)))
        yield


@cache  # graphs that were compiled with it go on with the very same function
def _dispatcher(peer: str) -> Callable[..., torch.Tensor]:
    stock = attention_dispatch.dispatch_attention_fn

    def dispatch(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *args, **kwargs):
        is_plain = attn_mask is None and not dropout_p and not is_causal and query.dtype == torch.bfloat16
        others = [name for name, value in kwargs.items() if name != "backend" and value not in (None, False)]
        if is_plain and not args and not others:
            return _attention(query, key, value, peer)
        return stock(query, key, value, attn_mask, dropout_p, is_causal, *args, **kwargs)

    return dispatch
