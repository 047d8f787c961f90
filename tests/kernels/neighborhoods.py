"""Neighbourhoods by brute force, token by token from the definition (arXiv 2504.16922), sharing no code with ours."""

import random
from functools import cache
from itertools import product

import torch

from dma_diffusers.kernels.tiling.neighborhood import Axis


@cache
def sees(n: int, w: int, s: int, d: int, causal: bool, query: int, key: int) -> bool:
    """True if a query sees a key in one dimension."""
    if query % d != key % d:
        return False
    n, i, j = len([token for token in range(n) if token % d == query % d]), query // d, key // d
    if causal:
        leader = min((i // s) * s + s - 1, n - 1)
        return max(leader - w + 1, 0) <= j < i + 1
    left, right = w // 2, w // 2 + (w % 2 - 1)
    leader = min((i // s) * s + s // 2, n - 1)
    start = max(leader - left, 0) + (n - right - leader - 1 if leader + right >= n else 0)
    return start <= j < start + w


def brute_mask(axes: tuple[Axis, ...]) -> torch.Tensor:
    """The mask, bool `[tokens, tokens]`, tokens in row-major order."""
    tokens = list(product(*(range(axis.length) for axis in axes)))
    rows = [
        [
            all(
                sees(axis.length, axis.window, axis.stride, axis.dilation, axis.causal, i, j)
                for axis, i, j in zip(axes, query, key, strict=True)
            )
            for key in tokens
        ]
        for query in tokens
    ]
    return torch.tensor(rows)


def tile_of_tokens(axes: tuple[Axis, ...], box: tuple[int, ...]) -> list[int]:
    """The tile of each token: boxes of one residue class, ordered by residue and then position in each dimension."""
    tokens = list(product(*(range(axis.length) for axis in axes)))
    names = [
        tuple(
            (i % axis.dilation, i // axis.dilation // side)
            for i, axis, side in zip(token, axes, box, strict=True)
        )
        for token in tokens
    ]
    numbers = {name: number for number, name in enumerate(sorted(set(names)))}
    return [numbers[name] for name in names]


def pairs_seen(
    mask: torch.Tensor, q_tiles: list[int], kv_tiles: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each pair of tiles, the number of pairs of tokens that the mask allows, and the number of all pairs."""
    q, kv = (torch.nn.functional.one_hot(torch.tensor(tiles)).double() for tiles in (q_tiles, kv_tiles))
    return q.T @ mask.double() @ kv, q.sum(0)[:, None] * kv.sum(0)


def draw_axes(rng: random.Random) -> tuple[Axis, ...]:
    """A neighbourhood on a small grid of 1 to 3 dimensions, of any lengths."""
    longest = rng.choice(((40,), (8, 9), (4, 5, 5)))
    return tuple(_draw_axis(rng, rng.randint(1, length)) for length in longest)


def _draw_axis(rng: random.Random, length: int) -> Axis:
    dilation = rng.randint(1, min(length, 4))
    window = rng.randint(1, length // dilation)
    return Axis(length, window, rng.randint(1, window), dilation, rng.random() < 0.3)
