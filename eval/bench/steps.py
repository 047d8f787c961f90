"""This module times whole forward calls of a model together with the self-attention inside them."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from dma_diffusers import apply, restore
from dma_diffusers.attach import interceptions
from dma_diffusers.config import DMAConfig
from dma_diffusers.errors import first_line
from dma_diffusers.eval.bench.bound import Gpu
from dma_diffusers.eval.bench.entries import FULL
from dma_diffusers.eval.bench.inputs import draw
from dma_diffusers.eval.bench.memory import CallMemory
from dma_diffusers.eval.bench.peers import PEERS, Peer
from dma_diffusers.eval.bench.shapes import Shape
from dma_diffusers.eval.bench.timing import take_turns

_PROBE_SECONDS = 0.5


def _flash(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v)


BACKENDS = (
    *(peer for peer in PEERS if peer.kind == FULL),
    Peer("FlashAttention-2 SDPA bf16", FULL, "H", "H", ("torch",), "torch", _flash),
)


def fastest_backend(shape: Shape, gpu: Gpu, seed: int) -> tuple[dict[str, Any], Peer]:
    """Time an attention call in each of `BACKENDS`; return their times, or why they are absent, and the fastest.

    Raises ValueError where none runs.
    """
    # Models lay tokens out as `[B, S, H, D]`.
    copy = [
        x.transpose(1, 2).contiguous().transpose(1, 2) for x in draw(shape, "normal", seed, gpu.l2_bytes)[0]
    ]
    found: dict[str, Any] = {}
    calls = {}
    for peer in BACKENDS:
        try:
            call = partial(peer.call, peer.load(), *copy)
            call()
            calls[peer] = lambda number, call=call: call()
        except Exception as error:  # a peer may fail in whatever way it likes
            torch.cuda.synchronize()  # raises, and ends the run, if the device is lost to all
            found[peer.name] = {"absent": first_line(error)}
    if not calls:
        raise ValueError("no backend of stock attention runs here: see `bench attention`")
    taken = take_turns(calls, _PROBE_SECONDS)
    found |= {peer.name: times for peer, times in taken.items()}
    return found, min(taken, key=lambda peer: taken[peer]["ms"])


class Clock(TorchFunctionMode):
    """A clock times the self-attention of a forward call. As a mode it times stock's, for which `stock` stands in.

    tokens: the length of a call of self-attention. Other calls of SDPA are left as they are.
    """

    def __init__(self, stock: Peer, tokens: int):
        super().__init__()
        self._stock = partial(stock.call, stock.load())
        self._tokens = tokens
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @property
    def calls(self) -> int:
        return len(self._events)

    @property
    def seconds(self) -> float:
        """Return the seconds of all calls, on a GPU that has been waited for."""
        return sum(start.elapsed_time(end) for start, end in self._events) / 1e3

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._sdpa(*args, **kwargs)
        return func(*args, **kwargs)

    def _sdpa(self, query, key, value, attn_mask=None, *args, **kwargs):
        if not query.shape[-2] == key.shape[-2] == self._tokens:
            return F.scaled_dot_product_attention(query, key, value, attn_mask, *args, **kwargs)
        if attn_mask is not None:
            raise RuntimeError("stock self-attention was given a mask, for which it has no fast kernel")
        return self.timed(self._stock, query, key, value)

    def timed(self, attend: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return what `attend` gives, and time it."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        out = attend(*args, **kwargs)
        end.record()
        self._events.append((start, end))
        return out


@dataclass(frozen=True)
class Step:
    """A step is one forward call: its time, its self-attention's time, the most memory allocated, and its result.

    extra_bytes: the most that a call of our attention takes beside its tensors; None for stock. said_bytes: what
    `doctor` says of it.
    """

    seconds: float
    attention: float
    calls: int
    peak_bytes: int
    extra_bytes: int | None
    said_bytes: int | None
    out: torch.Tensor


def step(
    model: torch.nn.Module,
    config: DMAConfig | None,
    inputs: dict[str, torch.Tensor],
    stock: Peer,
    tokens: int,
) -> Step:
    """Run one forward call with `config`, timed on the GPU."""
    clock, memory = Clock(stock, tokens), CallMemory()
    if config is None:
        restore(model)
    else:
        apply(model, config)  # which takes function modes for another's attention
        for interception in interceptions(model).values():
            interception.stand_in = partial(clock.timed, memory.attend)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad(), clock if config is None else nullcontext():
        start.record()
        out = model(**inputs, return_dict=False)[0]
        end.record()
    torch.cuda.synchronize()
    peak = max(memory.peak, torch.cuda.max_memory_allocated())
    extra = None if config is None else memory.extra
    return Step(start.elapsed_time(end) / 1e3, clock.seconds, clock.calls, peak, extra, memory.said, out)
