"""This module draws the inputs of a timed call, and tells how far its result is from exact."""

import math
from collections.abc import Callable

import torch

from dma_diffusers.eval.bench.shapes import Shape

KINDS = ("normal", "outliers")

Seen = Callable[[torch.Tensor], torch.Tensor]
"""A function says which keys some queries see.

It takes the queries' numbers, int64 `[n]` on the CPU, and returns bool `[n, tokens]`.
"""

_ROWS, _HEADS = 64, 4
_L2_MULTIPLE = 8  # 4-bit operands are a quarter of the inputs' size, and have to be twice the cache


def draw(shape: Shape, kind: str, seed: int, l2_bytes: int) -> list[tuple[torch.Tensor, ...]]:
    """Draw triples q, k, v, bf16 on the GPU, so many that a call finds none of its inputs in the L2 cache.

    kind: one of `KINDS`; outliers are in every sixteenth channel, with means in keys and values.
    """
    generator = torch.Generator("cuda").manual_seed(seed)
    copies = math.ceil(_L2_MULTIPLE * l2_bytes / (3 * 2 * math.prod(shape.size)))
    return [_triple(shape, kind, generator) for _ in range(max(copies, 1))]


def _triple(shape: Shape, kind: str, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=generator.device)

    scale, mean_k, mean_v = (torch.ones(shape.head_dim, device=generator.device), 0.0, 0.0)
    if kind == "outliers":
        scale[::16] = 8.0
        mean_k, mean_v = 4 * random(shape.head_dim), 4 * random(shape.head_dim)
    q = (random(*shape.size) / scale.sqrt()).bfloat16()
    k = (random(*shape.size) * scale + mean_k).bfloat16()
    return q, k, ((random(*shape.size) + mean_v) * scale).bfloat16()


class Sample:
    """A sample has some rows of a call's exact result: float64 attention of 64 queries in each of up to four heads.

    seen: the keys that count; all if left out.
    """

    def __init__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seed: int = 0, seen: Seen | None = None
    ):
        batch, heads, tokens, head_dim = q.shape
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(tokens, generator=generator)[:_ROWS]
        hidden = None if seen is None else ~seen(rows).to(q.device)
        self._rows = rows.to(q.device)
        drawn = torch.randperm(batch * heads, generator=generator)[:_HEADS].tolist()
        self._heads = [divmod(index, heads) for index in drawn]
        self._exact = []
        for b, h in self._heads:  # heads go one at a time: one's float64 keys are 120 MB at 118,800 tokens
            scores = q[b, h, self._rows].double() @ k[b, h].double().mT * head_dim**-0.5
            if hidden is not None:
                scores.masked_fill_(hidden, -math.inf)
            self._exact.append(scores.softmax(-1) @ v[b, h].double())

    def relative_l2(self, out: torch.Tensor) -> float:
        """Return ‖out − exact‖ / ‖exact‖ over the sampled rows of a result `[B, H, S, D]`."""
        exact = torch.stack(self._exact)
        sampled = torch.stack([out[b, h, self._rows].double() for b, h in self._heads])
        return ((sampled - exact).norm() / exact.norm()).item()
