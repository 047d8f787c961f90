"""This module compares ways to choose the pairs of tiles that attention computes precisely, on recordings of the demos.

`python -m dma_diffusers.eval.recordings.routers recordings -o routers.json` records both demo models into a folder, and
measures there, in float32, what eval/results/routing.md tells.
"""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dma_diffusers.eval.intervals import bootstrap
from dma_diffusers.eval.quality.prompts import built_in, read_prompts
from dma_diffusers.eval.recordings.exact import in_slots
from dma_diffusers.eval.recordings.record import record
from dma_diffusers.eval.recordings.store import Recording, Recordings
from dma_diffusers.kernels.quantiser import reference as quantiser
from dma_diffusers.kernels.routing import reference as routing
from dma_diffusers.kernels.tiling import boxes
from dma_diffusers.kernels.tiling.layout import SUBTILE, TILE
from dma_diffusers.kernels.tiling.tile_order import TileOrder
from dma_diffusers.pipelines.load import load_pipeline, named_model, recommended_call

PROMPTS = {"demo": 8, "demo-video": 4}
STEPS, AGO = (8, 18), (1, 3, 6)  # of 24 steps: those measured, and how many steps earlier a memory is from
RECORDED = sorted({step - ago for step in STEPS for ago in (0, *AGO)})
ROWS, REMEMBERED = (2, 4, 8, 16), 16  # exact rows of each Q tile
SHARES = {"skip": (0.25, 0.5), "mean": (0.25, 0.5), "mxfp4": (0.1, 0.25)}
FARTHEST_BEFORE = (
    math.sqrt(2 * math.log(TILE)) / routing.LN_2
)  # until sub-tiles came, where `routing.FARTHEST` is now


class Call(NamedTuple):
    """One call in tile order, float32 `[H, S, D]` each: q times scale and log2 e, k less its mean, v."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


def errors(call: Call, earlier: dict[int, Call], text_tiles: int, seed: int) -> dict[str, float]:
    """Return the relative L2 error of the output for every "router | use share | who has the share".

    use: what becomes of the pairs that are not computed exactly. A share is that of all heads together, or each Q
    tile's own. Tiles of text are exact and outside the shares.
    """
    exact, others = _parts(call)
    names, chosen = [], []
    for router, score in _scores(call, earlier, seed).items():
        offered = score[:, text_tiles:, text_tiles:]
        for use, shares in SHARES.items():
            for share in shares:
                for who in ("heads", "tile") if use in ("skip", "mean") else ("heads",):
                    is_exact = torch.ones_like(score, dtype=torch.bool)
                    is_exact[:, text_tiles:, text_tiles:] = top(offered, share, who)
                    names.append((router, use, share, who))
                    chosen.append(is_exact)
    wanted = output(exact.sum(2))
    found = {}
    for use in SHARES:
        own = [number for number, name in enumerate(names) if name[1] == use]
        relative = relative_errors(exact, others.get(use), [chosen[number] for number in own], wanted)
        for number, error in zip(own, relative, strict=True):
            router, use, share, who = names[number]
            found[f"{router} | {use} {share:g} | {who}"] = error
    return found


def relative_errors(
    exact: torch.Tensor, other: torch.Tensor | None, chosen: list[torch.Tensor], wanted: torch.Tensor
) -> list[float]:
    """Return the relative L2 error of the output for each choice of exact pairs, bool `[H, q_tiles, k_tiles]`.

    exact, other: what pairs add, as `_parts` returns it; without `other` the rest is skipped.
    """
    weight = torch.stack(chosen, 2).float()  # [H, q_tiles, choices, k_tiles]
    lost = torch.zeros(len(chosen))
    for head, q_tile in torch.cartesian_prod(*map(torch.arange, exact.shape[:2])).tolist():
        mixed = weight[head, q_tile] @ exact[head, q_tile].flatten(1)
        if other is not None:
            mixed += (1 - weight[head, q_tile]) @ other[head, q_tile].flatten(1)
        lost += (output(mixed.unflatten(1, exact.shape[3:])) - wanted[head, q_tile]).square().sum((1, 2))
    return (lost / wanted.square().sum()).sqrt().tolist()


def output(added: torch.Tensor) -> torch.Tensor:
    """Return what pairs added to the output over what they added to the sum, 0 where they added nothing."""
    total = added[..., -1:]
    return added[..., :-1] / torch.where(total == 0, 1, total)


def _scores(call: Call, earlier: dict[int, Call], seed: int) -> dict[str, torch.Tensor]:
    """Return the log2 importance of pairs by each router, `[H, q_tiles, k_tiles]`."""
    every_fourth = torch.arange(0, TILE, routing.SAMPLE_STRIDE)
    every = torch.arange(TILE)
    scores = {
        "oracle": by_rows(call, every.expand(call.q.shape[1] // TILE, -1)),
        "pools of 128, every 4th token": by_pools(call, every_fourth, 1, FARTHEST_BEFORE),
        "pools of 128, staggered": by_pools(call, routing.sample(), 1),
        "pools of 32, staggered": by_pools(call, routing.sample(), routing.SUBTILES),
        "pools of 32, all tokens": by_pools(call, every, routing.SUBTILES),
        "pools of 32, all tokens, no variance": by_pools(call, every, routing.SUBTILES, 0.0),
    }
    generator = torch.Generator().manual_seed(seed)
    scores |= {f"{count} rows": by_rows(call, _drawn(call, count, generator)) for count in ROWS}
    for ago, before in earlier.items():
        scores[f"{REMEMBERED} rows, {ago} steps ago"] = by_rows(before, _drawn(before, REMEMBERED, generator))
    staggered = routing.sample(count=routing.ROWS).expand(call.q.shape[1] // TILE, -1)
    keys = routing.sample(count=routing.KEYS)
    for ago, each in {0: call, **earlier}.items():
        scores[f"{routing.ROWS} rows, staggered, {ago} steps ago"] = by_rows(each, staggered)
        scores[f"{routing.ROWS} rows × {routing.KEYS} keys, {ago} steps ago"] = by_rows(each, staggered, keys)
    scores[f"all rows, {max(AGO)} steps ago"] = by_rows(
        earlier[max(AGO)], every.expand(call.q.shape[1] // TILE, -1)
    )
    return scores


def _drawn(call: Call, count: int, generator: torch.Generator) -> torch.Tensor:
    """Draw rows of each Q tile, int64 `[q_tiles, count]`."""
    q_tiles = call.q.shape[1] // TILE
    return torch.rand(q_tiles, TILE, generator=generator).argsort(1)[:, :count]


def by_rows(call: Call, rows: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
    """Importance by some rows of each Q tile, and by these keys of each KV tile; None for all."""
    places = (torch.arange(len(rows))[:, None] * TILE + rows).flatten()
    k = call.k if keys is None else call.k.unflatten(1, (-1, TILE))[:, :, keys].flatten(1, 2)
    square = softmax(call.q[:, places] @ k.mT).square()
    square = square.unflatten(-1, (call.k.shape[1] // TILE, -1)).sum(-1).unflatten(1, rows.shape).mean(2)
    return (square.log2() + _spread(call, torch.arange(TILE)).log2()[:, None]) / 2


def by_pools(
    call: Call, places: torch.Tensor, parts: int, farthest: float = routing.FARTHEST
) -> torch.Tensor:
    def log_mean_exp(deviation: torch.Tensor) -> torch.Tensor:
        within = deviation.clamp(max=farthest)
        return routing.LN_2 * within * (deviation - within / 2)

    q, k = (x.unflatten(1, (-1, TILE))[:, :, places] for x in call[:2])
    k = k.flatten(1, 2).unflatten(1, (-1, len(places) // parts))
    (q_mean, k_mean), (q_variance, k_variance) = (
        [x.mean(2) for x in (q, k)], [x.var(2, unbiased=False) for x in (q, k)],
    )  # fmt: skip
    score = q_mean @ k_mean.mT
    deviation = q_variance @ (k_mean.square() + k_variance).mT + q_mean.square() @ k_variance.mT
    deviation = deviation.sqrt()
    mean_exp = score + log_mean_exp(deviation)
    total = torch.logsumexp(mean_exp * routing.LN_2, -1, keepdim=True) / routing.LN_2
    square = torch.exp2(2 * (score - total) + log_mean_exp(2 * deviation))
    square = square.unflatten(-1, (-1, parts)).sum(-1)
    return (square.log2() + _spread(call, places).log2()[:, None]) / 2


def _spread(call: Call, places: torch.Tensor) -> torch.Tensor:
    return call.v.unflatten(1, (-1, TILE))[:, :, places].var(2, unbiased=False).sum(-1)


def top(score: torch.Tensor, share: float, who: str) -> torch.Tensor:
    """Choose the highest, rounded to whole pairs."""
    flat = score.flatten() if who == "heads" else score
    count = max(math.floor(share * flat.shape[-1] + 0.5), 1)
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    return chosen.scatter_(-1, flat.topk(count).indices, True).view(score.shape)


def _parts(call: Call) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return what pairs add to the output and, in a last channel, to the sum: `[H, q_tiles, k_tiles, 128, D + 1]`.

    The first is exact; the others are by the means of sub-tiles, and in LOW, MXFP4 with P·V in FP8.
    """
    q, k, v = call
    scores = q @ k.mT
    largest = scores.amax(-1, keepdim=True)
    k_means, v_means = (x.unflatten(1, (-1, SUBTILE)).mean(2) for x in (k, v))
    others = {"mean": products(q @ k_means.mT + math.log2(SUBTILE) - largest, v_means, TILE // SUBTILE)}
    units = quantiser.value_units(v[None])
    rounded_v = (quantiser.quantised_v(v[None], units).float() * units.scale + units.mean)[0]
    low = quantiser.quantised_q(q[None], "mxfp4")[0] @ quantiser.quantised_k(k[None], "mxfp4")[0].mT
    others["mxfp4"] = products(low - largest, rounded_v, TILE, rounds=True)
    return products(scores - largest, v, TILE), others


def products(exponents: torch.Tensor, v: torch.Tensor, width: int, rounds: bool = False) -> torch.Tensor:
    p = torch.exp2(exponents).unflatten(1, (-1, TILE)).unflatten(3, (-1, width)).transpose(2, 3)
    values = v.unflatten(1, (-1, width))[:, None]
    multiplied = (p * 256).to(torch.float8_e4m3fn).float() / 256 if rounds else p
    return torch.cat((multiplied @ values, p.sum(-1, keepdim=True)), -1)


def softmax(scores: torch.Tensor) -> torch.Tensor:
    return torch.softmax(scores * routing.LN_2, -1)


def call_of(recordings: Recordings, recording: Recording) -> Call:
    """Read a call in tile order; raises ValueError where slots are empty or there are several batch entries."""
    order = TileOrder(recording.layout, boxes.plan(recording.grid)[0]).token_order
    if (order < 0).any() or recording.shape[0] > 1:
        raise ValueError(
            f"{recording.file}: it must be one batch entry, whose text and grid fill whole tiles"
        )
    q, k, v, _ = (x if x is None else x[0].float() for x in in_slots(recordings.tensors(recording), order))
    scale = recording.shape[-1] ** -0.5 if recording.scale is None else recording.scale
    return Call(q * (scale * math.log2(math.e)), k - k.mean(1, keepdim=True), v)


def _measured(recordings: Recordings) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield the prompt and the errors of each conditional call at one of `STEPS`."""
    by_place = {(r.prompt, r.module, r.call, r.step): r for r in recordings}
    for number, recording in enumerate(recordings):
        if recording.call or recording.step not in STEPS:
            continue
        before = {ago: (recording.prompt, recording.module, 0, recording.step - ago) for ago in AGO}
        earlier = {ago: call_of(recordings, by_place[place]) for ago, place in before.items()}
        text_tiles = recording.layout.text_length // TILE
        yield recording.prompt, errors(call_of(recordings, recording), earlier, text_tiles, number)


def compare(recordings: Recordings) -> dict[str, Any]:
    """Return routers' errors by `choices`, means over prompts, modules and steps with their 95 % intervals."""
    found: dict[str, dict[str, dict[int, list[float]]]] = {}
    for prompt, of_call in _measured(recordings):
        for name, error in of_call.items():
            router, _, choice = name.partition(" | ")
            found.setdefault(router, {}).setdefault(choice, {}).setdefault(prompt, []).append(error)
    intervals = {
        router: [
            [round(x, 4) for x in bootstrap([[sum(errors) / len(errors) for errors in by_prompt.values()]])]
            for by_prompt in by_choice.values()
        ]
        for router, by_choice in found.items()
    }
    return {"choices": list(next(iter(found.values()))), "errors": intervals}


def recorded(name: str, count: int, folder: Path, steps: list[int]) -> Recordings:
    """Record so many prompts of a demo model into its folder in this one."""
    model = named_model(name)
    prompts = [prompt.text for prompt in read_prompts(built_in(model))[0]]
    return record(
        load_pipeline(model), prompts[:: len(prompts) // PROMPTS[name]][:count], folder / name,
        recommended_call(model), steps=steps, limit=4_000_000_000,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where recordings are, or go: 3.3 GB")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    results = {}
    for name, count in PROMPTS.items():
        recordings = recorded(name, count, arguments.folder, RECORDED)
        results[name] = {"prompts": len(recordings.prompts), "steps": STEPS, **compare(recordings)}
        arguments.output.write_text(json.dumps(results, separators=(",", ":")))


if __name__ == "__main__":
    main()
