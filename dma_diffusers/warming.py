"""Warming up: the kernels that a pipeline's first picture would wait for are compiled before it is drawn."""

import logging
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from dma_diffusers.attach import interceptions
from dma_diffusers.components import device_of, transformers_of
from dma_diffusers.decision import DTYPES
from dma_diffusers.fused import usually_changes
from dma_diffusers.interception import Interception
from dma_diffusers.kernels import operator
from dma_diffusers.kernels.call import Norms
from dma_diffusers.kernels.lowerings import has_triton
from dma_diffusers.lengths import grid_of, text_length_of

logger = logging.getLogger("dma_diffusers")

Size = int | str | tuple[int, ...]


@dataclass(frozen=True)
class KindOfCall:
    """Calls of the operator for which the same kernels are compiled, and the same plan is made.

    shape: of q, k and v, `[batch, heads, tokens, head_dim]`. masks_keys: whether they have a mask over keys.
    options: keyword arguments of the operator, as sorted pairs. rounds_twice: as in `Norms`, where the operator does
    norm and RoPE of q and k; None where it doesn't.
    """

    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    device: torch.device
    masks_keys: bool
    options: tuple[tuple[str, Any], ...]
    rounds_twice: bool | None = None

    def run(self) -> None:
        """Calls the operator on zeros, laid out as most models have their heads: `[batch, tokens, heads, head_dim]`."""
        batch, heads, tokens, head_dim = self.shape
        q, k, v = (
            torch.zeros(batch, tokens, heads, head_dim, dtype=self.dtype, device=self.device).transpose(1, 2)
            for _ in range(3)
        )
        mask = torch.ones(batch, tokens, dtype=torch.bool, device=self.device) if self.masks_keys else None
        change: dict[str, Any] = {}
        if self.rounds_twice is not None:
            weight = torch.ones(head_dim, dtype=self.dtype, device=self.device)
            norms = Norms(weight, weight.clone(), 1e-6, 0, weight.clone(), weight.clone(), self.rounds_twice)
            angles = torch.ones(2, tokens, head_dim // 2, device=self.device)
            rope = (angles[0], angles[1])
            change = {"norms": norms, "q_rope": rope, "k_rope": rope}
        operator.attention(q, k, v, mask, **dict(self.options), **change)

    def __str__(self) -> str:
        options = dict(self.options)
        formats = f"{options['high']}|{options['low']}"
        mask = ", with a mask" if self.masks_keys else ""
        return f"{'×'.join(map(str, self.shape))}, {formats}, {options['policy']}{mask}"


@dataclass(frozen=True)
class Warmed:
    """A kind of call that has run. kernels: names of those that were compiled for it; seconds: how long it all took."""

    call: KindOfCall
    kernels: tuple[str, ...]
    seconds: float

    def __str__(self) -> str:
        return f"{self.call}: {', '.join(self.kernels) or 'no new kernel'}, {self.seconds:.1f} s"


def warmup(
    pipe: Any, sizes: Iterable[Size], *, text: int | None = None, batch: int = 1, progress: bool = True
) -> list[Warmed]:
    """Compiles what the attention of pictures or videos of these sizes needs, so that the first one is not slow.

    It calls the attention operator, on zeros, once for each kind of call that the transformers' modules make: of their
    heads, precisions and policies, and with a mask too where the model may mask its text. The plans that are made on
    the way are kept, as far as there are eight lengths at most. The pipeline itself is not called; a model that
    torch.compile is to compile still does so at its first call.

    Args:
        pipe: a pipeline, or a transformer, to which DMA was applied, on the device where it will draw.
        sizes: in pixels, (width, height) or (width, height, frames), or in words, "1024x1024"; or a number of tokens
            beside the text's. Lengths are not compiled in: one size will often do for all.
        text: the number of text tokens; None for the most that the pipeline has.
        batch: the sequences in one call: twice the pictures, where a pipeline guides in one call.
        progress: whether a bar is shown on a terminal.

    Returns:
        The kinds of calls, none for modules that run stock attention.

    Raises:
        ValueError: where DMA was not applied, for a size of which the pipeline doesn't tell the tokens, and for modules
            that don't tell their heads.

    Examples:
        >>> apply(pipe)
        >>> warmup(pipe, ["256x256"])
    """
    parsed = [_parsed(size) for size in ([sizes] if isinstance(sizes, str) else sizes)]
    calls: dict[KindOfCall, None] = {}
    applied = [(model, interceptions(model)) for _, model in transformers_of(pipe) if interceptions(model)]
    if not applied:
        raise ValueError("nothing to warm up: call dma_diffusers.apply first")
    for size in parsed:
        for model, modules in applied:
            calls |= dict.fromkeys(_kinds(pipe, model, modules, size, text, batch))
    console = Console(stderr=True)
    hidden = not (progress and console.is_terminal)
    return [
        _warmed(call)
        for call in track(calls, "Compiling attention", console=console, transient=True, disable=hidden)
    ]


@torch.no_grad()
def _warmed(call: KindOfCall) -> Warmed:
    start = time.perf_counter()
    names: AbstractContextManager[list[str]] = nullcontext([])
    if has_triton():
        from dma_diffusers.kernels.device.compiled import compiled_kernels

        names = compiled_kernels()
    with names as compiled:
        call.run()
    warmed = Warmed(call, tuple(compiled), time.perf_counter() - start)
    logger.info("warmup: %s", warmed)
    return warmed


def _parsed(size: Size) -> int | tuple[int, ...]:
    """A number of tokens, or (width, height) or (width, height, frames)."""
    try:
        found = tuple(map(int, size.replace("×", "x").split("x"))) if isinstance(size, str) else size
        numbers = [found] if isinstance(found, int) else list(found)
        if all(number > 0 for number in numbers) and (isinstance(found, int) or len(numbers) in (2, 3)):
            return found if isinstance(found, int) else tuple(numbers)
    except (TypeError, ValueError):
        pass
    raise ValueError(
        "a size is (width, height) or (width, height, frames) in pixels, or a number of tokens, "
        f"each more than 0, got {size!r}"
    )


def _kinds(
    pipe: Any, model: Any, modules: dict[str, Interception], size: int | tuple[int, ...], text: int | None, batch: int
) -> Iterator[KindOfCall]:  # fmt: skip
    """The kinds of calls that the intercepted modules of a model make for one size."""
    grid = () if isinstance(size, int) else grid_of(pipe, model, size)
    tokens = size if isinstance(size, int) else math.prod(grid)
    dtype = model.dtype if model.dtype in DTYPES else torch.bfloat16
    for name, interception in modules.items():
        own, family = interception.own, interception.family
        if own.needs_grid and not grid:
            raise ValueError(f"{own.needs_grid} needs a grid: give sizes in pixels, not a number of tokens")
        heads, head_dim = _heads(model, name)
        module = model.get_submodule(name)
        device = device_of(model, module)
        like = torch.empty(0, dtype=dtype, device=device)
        kind = usually_changes(module.processor.stock, module, like)
        length = 0 if family.text == "none" else text_length_of(pipe) if text is None else text
        start = tokens if family.text == "last" and length else 0
        shape = (batch, heads, tokens + length, head_dim)
        for config in interception.configs:
            if tokens + length < config.least_keys(device, head_dim):
                continue
            arguments = config.arguments((start, start + length)) | {
                "grid": grid if interception.has_grid else (), "masks_text": family.masks_text
            }  # fmt: skip
            for masks_keys in (False, True) if family.masks_text and length else (False,):
                if config.why_stock(device, head_dim, "text" if masks_keys and config.protect_text else ""):
                    continue
                yield KindOfCall(
                    shape, dtype, device, masks_keys, tuple(sorted(arguments.items())),
                    kind.rounds_twice if kind else None,
                )  # fmt: skip


def _heads(model: Any, name: str) -> tuple[int, int]:
    """The heads of a module, and their dimension. Raises ValueError if it doesn't tell."""
    module = model.get_submodule(name)
    heads = getattr(module, "heads", None) or getattr(module, "num_heads", None)
    width = getattr(module, "inner_dim", None) or getattr(getattr(module, "to_q", None), "out_features", None)
    head_dim = getattr(module, "head_dim", None) or (width // heads if heads and width else None)
    if not heads or not head_dim:
        raise ValueError(f"{name} of {type(model).__name__} does not tell its heads: it can't be warmed up")
    return heads, head_dim
