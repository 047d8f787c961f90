"""This module measures whether MEAN tiles gain by a term for the variance of their scores, on recordings of the demos.

The mean of 2^score over normal scores is 2^(mean + ln 2 / 2 · variance). A MEAN tile leaves the second term away.
`python -m dma_diffusers.eval.recordings.variance recordings -o mean_variance.txt` records calls of both demo models
into a folder, and measures there, in float32, what eval/results/routing.md tells of that term.
"""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import torch

from dma_diffusers.eval.recordings.routers import (
    SHARES,
    STEPS,
    Call,
    by_pools,
    by_rows,
    call_of,
    recorded,
    softmax,
    top,
)
from dma_diffusers.eval.recordings.store import Recordings
from dma_diffusers.kernels.routing import reference as routing
from dma_diffusers.kernels.tiling.layout import SUBTILE, TILE

PROMPTS = {"demo": 4, "demo-video": 2}


def errors(call: Call, text_tiles: int) -> dict[str, float]:
    """Return the relative L2 error of the output for every "router share variance".

    variance: of the scores of a sub-tile, which is "none", "diagonal" (by the variances of its keys' channels) or
    "full" (by the scores themselves). Each Q tile has its own share of exact pairs; tiles of text are exact.
    """
    q, k, v = call
    scores = q @ k.mT
    wanted = softmax(scores) @ v
    k_parts, v_parts = (x.unflatten(1, (-1, SUBTILE)) for x in (k, v))
    of_means, values = q @ k_parts.mean(2).mT + math.log2(SUBTILE), torch.cat((v, v_parts.mean(2)), 1)
    variances = {
        "none": torch.zeros(()),
        "diagonal": q.square() @ k_parts.var(2, unbiased=False).mT,
        "full": scores.unflatten(-1, (-1, SUBTILE)).var(-1, unbiased=False),
    }
    every_row = torch.arange(TILE).expand(q.shape[1] // TILE, -1)
    routers = {
        "oracle": by_rows(call, every_row),
        "pools": by_pools(call, routing.sample(), routing.SUBTILES),
    }
    found = {}
    for router, importance in routers.items():
        for share in SHARES["mean"]:
            is_exact = torch.ones_like(importance, dtype=torch.bool)
            is_exact[:, text_tiles:, text_tiles:] = top(
                importance[:, text_tiles:, text_tiles:], share, "tile"
            )
            rows = is_exact.repeat_interleave(TILE, 1)
            exact = scores.masked_fill(~rows.repeat_interleave(TILE, 2), -math.inf)
            is_hidden = rows.repeat_interleave(TILE // SUBTILE, 2)
            for term, variance in variances.items():
                means = (of_means + routing.LN_2 / 2 * variance).masked_fill(is_hidden, -math.inf)
                out = softmax(torch.cat((exact, means), -1)) @ values
                found[f"{router} {share:g} {term}"] = ((out - wanted).norm() / wanted.norm()).item()
    return found


def lines(name: str, recordings: Recordings) -> Iterator[str]:
    """Yield a line for each choice: the mean error of each prompt's conditional calls."""
    found: dict[str, dict[int, list[float]]] = {}
    for recording in recordings:
        if recording.call:
            continue
        of_call = errors(call_of(recordings, recording), recording.layout.text_length // TILE)
        for choice, error in of_call.items():
            found.setdefault(choice, {}).setdefault(recording.prompt, []).append(error)
    for choice, by_prompt in found.items():
        means = [sum(of_prompt) / len(of_prompt) for of_prompt in by_prompt.values()]
        yield f"{name} {choice}: {sum(means) / len(means):.4f} ({', '.join(f'{mean:.4f}' for mean in means)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where recordings go")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    found = ["model, router, share of exact pairs, variance: error, a mean over prompts (each prompt's)"]
    for name, count in PROMPTS.items():
        found += lines(name, recorded(name, count, arguments.folder, list(STEPS)))
    arguments.output.write_text("\n".join(found) + "\n")


if __name__ == "__main__":
    main()
