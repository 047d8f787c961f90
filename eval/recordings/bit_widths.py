"""This module compares ways to choose the pairs of tiles whose Q·K has 8 bits rather than 4, on recordings.

The low-bit FlashAttention paper (ICCV-W 2025) gives more bits where δ = amax/127, the INT8 scale, is over a threshold.
`python -m dma_diffusers.eval.recordings.bit_widths recordings -o bit_widths.json` measures, on the recordings that
`routers` makes, what eval/results/routing.md tells of INT8 and INT4.
"""

import argparse
import json
from pathlib import Path

import torch

from dma_diffusers.eval.intervals import bootstrap
from dma_diffusers.eval.recordings.routers import STEPS, Call, by_pools, by_rows, call_of, products, top
from dma_diffusers.eval.recordings.store import Recordings, read_recordings
from dma_diffusers.kernels.quantiser import reference as quantiser
from dma_diffusers.kernels.routing import reference as routing
from dma_diffusers.kernels.tiling.layout import TILE

HIGH, LOW = "int8", "int4"
PROMPTS = {"demo": 4, "demo-video": 2}  # the first ones
SHARES = (0.1, 0.25, 0.5)  # of all pairs, that are HIGH


def errors(call: Call, text_tiles: int) -> dict[str, list[float]]:
    """Return, for each router, the relative L2 errors of the output at `SHARES`; and at none and all pairs HIGH.

    P·V is exact. Tiles of text are HIGH, and outside the shares.
    """
    q, k, v = call
    scores = q @ k.mT
    largest = scores.amax(-1, keepdim=True)
    exact = products(scores - largest, v, TILE).sum(2)
    wanted = exact[..., :-1] / exact[..., -1:]
    high, low = (
        products(
            quantiser.quantised_q(q[None], name)[0] @ quantiser.quantised_k(k[None], name)[0].mT - largest,
            v,
            TILE,
        )
        for name in (HIGH, LOW)
    )

    def error(is_high: torch.Tensor) -> float:
        mixed = torch.where(is_high[..., None, None], high, low).sum(2)
        out = mixed[..., :-1] / mixed[..., -1:]
        return ((out - wanted).norm() / wanted.norm()).item()

    found = {}
    for router, score in _scores(call).items():
        found[router] = []
        for share in SHARES:
            is_high = torch.ones_like(score, dtype=torch.bool)
            is_high[:, text_tiles:, text_tiles:] = top(score[:, text_tiles:, text_tiles:], share, "heads")
            found[router].append(error(is_high))
    nothing = torch.ones_like(score, dtype=torch.bool)
    found["all"] = [error(nothing)]
    nothing[:, text_tiles:, text_tiles:] = False
    return found | {"none": [error(nothing)]}


def _scores(call: Call) -> dict[str, torch.Tensor]:
    """Return the log2 importance of pairs by each router, `[H, q_tiles, k_tiles]`."""
    q_delta, k_delta = (x.unflatten(1, (-1, TILE)).abs().amax((2, 3)).log2() - 7 for x in call[:2])
    delta = q_delta[:, :, None] + k_delta[:, None, :]
    every_row = torch.arange(TILE).expand(call.q.shape[1] // TILE, -1)
    mass, pools = by_rows(call, every_row), by_pools(call, routing.sample(), routing.SUBTILES)
    return {
        "δ of the tiles of Q and of K": delta,
        "δ of the tile of K": k_delta[:, None, :].expand_as(delta),
        "pools of 32, staggered": pools,
        "pools of 32, staggered, times δ": pools + delta,
        "oracle": mass,
        "oracle, times δ": mass + delta,
        "at random": torch.rand(delta.shape, generator=torch.Generator().manual_seed(0)),
    }


def compare(recordings: Recordings, prompts: int) -> dict[str, list[list[float]]]:
    """Return each router's errors, means over prompts, modules and steps with their 95 % intervals over prompts."""
    found: dict[str, dict[int, list[list[float]]]] = {}
    for recording in recordings:
        if recording.call or recording.step not in STEPS or recording.prompt >= prompts:
            continue
        of_call = errors(call_of(recordings, recording), recording.layout.text_length // TILE)
        for router, of_shares in of_call.items():
            found.setdefault(router, {}).setdefault(recording.prompt, []).append(of_shares)
    return {
        router: [
            [round(x, 4) for x in bootstrap([[sum(column) / len(column) for column in columns]])]
            for columns in zip(*(list(zip(*calls, strict=True)) for calls in by_prompt.values()), strict=True)
        ]
        for router, by_prompt in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the recordings of `routers` are")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    results = {
        name: {"prompts": count, **compare(read_recordings(arguments.folder / name), count)}
        for name, count in PROMPTS.items()
    }
    arguments.output.write_text(json.dumps({"shares": SHARES, **results}, separators=(",", ":")))


if __name__ == "__main__":
    main()
