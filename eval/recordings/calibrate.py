"""Calibration chooses formats, windows and dense steps, module by module and head by head, within an error budget."""

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from dma_diffusers.config import DMAConfig
from dma_diffusers.eval.cost import check_target, current_target
from dma_diffusers.eval.linears.options import Item, choice_of
from dma_diffusers.eval.recordings import cost
from dma_diffusers.eval.recordings.measure import Measured, mean_of_present, measure
from dma_diffusers.eval.recordings.policy import EVERY_KEY, Choice, Policy
from dma_diffusers.eval.recordings.search import Search, Selection
from dma_diffusers.eval.recordings.store import Recordings
from dma_diffusers.kernels.defaults import FORMAT_PAIRS
from dma_diffusers.kernels.tiling.layout import TILE, tiles
from dma_diffusers.policy_file import check_quality

LADDER = (0.0, 0.25, 0.5, 0.75, 1.0)
SINKS = (0, TILE)


def calibrate(
    recordings: Recordings,
    quality: float,
    *,
    target: str | None = None,
    formats: Sequence[tuple[str, str]] | None = None,
    linears: Sequence[Item] = (),
    device: torch.device | str | None = None,
    on_step: Callable[[str, int, int], None] = lambda title, done, total: None,
) -> Policy:
    """Find the cheapest choice within the error budget of `quality`, and those of a ladder of other qualities.

    quality: 1 allows no more error than the most precise options make, 0 as much as the cheapest; between them the
    budget's logarithm is linear. target: the GPU to be fast on, by architecture; this machine's if its rates are known,
    else sm_100. formats: the pairs (HIGH, LOW) to choose from, the target's own by default.
    linears: what linear layers can have on the target (`linears.options.measure`); none leaves them as they are.

    Errors are squared norms over those of the exact output of their module, a mean over prompts, steps and modules,
    among which each linear layer counts as one: record steps that stand for all. Costs are predicted (`tile_clocks`,
    `linear_clocks`). Both add up, so at one price of cost every head takes its best window, every module its best
    formats and sink, every input of linear layers its best way, and the model the best noise level above which steps
    are dense (`Search`). The choice is then measured as it is, all heads of a call together, and made anew with less to
    spend where it errs by more than the budget (to a thousandth). Raises ValueError for no recordings, an unknown
    target, or formats that it has no kernel for.
    """
    check_quality(quality)
    target = target or current_target()
    check_target(target)
    pairs = [tuple(pair) for pair in formats or FORMAT_PAIRS[target]]
    if not len(recordings):
        raise ValueError(f"there are no recordings in {recordings.folder}")
    options = [{"high": high, "low": low, "sink": sink} for high, low in pairs for sink in SINKS]
    windows, levels = _windows(recordings), _levels(recordings)
    candidates = [
        [DMAConfig(**option, window=window, min_length=0) for window in windows] for option in options
    ]
    whole = cost.full_precision_clocks(recordings, target) + sum(item.costs[0] for item in linears)
    parts = len(recordings.modules) + sum(len(item.layers) for item in linears)
    share = len(recordings.modules) / parts
    costs = np.array([[cost.head_clocks(recordings, config, target) for config in row] for row in candidates])
    named = {f"{i} {j}": config for i, row in enumerate(candidates) for j, config in enumerate(row)}
    measured = measure(recordings, named, device, on_step)
    errors = np.array([_errors(measured[name]) for name in named]).reshape(costs.shape)
    search = Search(
        [_table(recordings, level, share * errors, costs / whole) for level in levels],
        [(item.errors / parts, item.costs / whole) for item in linears],
    )

    rungs = sorted({*LADDER, float(quality)})
    budgets = {rung: search.most ** (1 - rung) * search.least**rung for rung in rungs}
    aims, choices = dict(budgets), {}
    while waiting := [rung for rung in rungs if rung not in choices]:
        found = {rung: search.within(aims[rung] * (1 + 1e-9)) for rung in waiting}
        configs = {
            str(rung): _config(recordings, choice, options, windows, levels) for rung, choice in found.items()
        }
        runs = {name: DMAConfig.of(config, min_length=0) for name, config in configs.items()}
        for rung, values in zip(waiting, measure(recordings, runs, device, on_step).values(), strict=True):
            of_attention = float(_errors(values).mean(1).sum())
            chosen = choice_of(linears, found[rung].ways) if linears else None
            error = share * of_attention + ((1 - share) * chosen.relative_l2**2 if chosen else 0)
            if error > 1.001 * budgets[rung] and aims[rung] > search.least:
                aims[rung] = (
                    0.99 * budgets[rung] / error * search.error(found[rung])
                )  # this choice is not found again
                continue
            config = configs[str(rung)]
            clocks = cost.head_clocks(recordings, config, target).mean(1).sum()
            clocks += chosen.clocks if chosen else 0
            of_modules = mean_of_present(values.of_modules, (0, 2)).tolist()
            choices[rung] = Choice(
                rung, config, budgets[rung] ** 0.5, error**0.5, float(clocks / whole),
                float(mean_of_present(values.recall, (0, 1, 2, 3))),
                dict(zip(recordings.modules, of_modules, strict=True)),
                of_attention**0.5, chosen,
            )  # fmt: skip
    about = ("pipeline", "prompts", "seeds", "call", "steps", "versions", "hardware")
    evidence = {
        "target": target, "formats": pairs, "windows": windows, "prompts_recorded": len(recordings.prompts),
        **{name: recordings.settings[name] for name in about},
    }  # fmt: skip
    ladder = tuple(choices[rung] for rung in rungs)
    return Policy(float(quality), recordings.settings["model"], ladder, evidence)


def _windows(recordings: Recordings) -> list[int]:
    """Return the windows to choose from: no band, the diagonal tile, bands that double, and everything."""
    last = max(tiles(recording.shape[2]) for recording in recordings) - 1
    reach, windows = 0, [0]
    while reach < last:
        windows.append((2 * reach + 1) * TILE)
        reach = 2 * reach + 1
    return [*windows, EVERY_KEY]


def _levels(recordings: Recordings) -> list[float | None]:
    """Return noise levels between recorded steps, above which steps may be dense; None is no such step."""
    sigmas = sorted({recording.sigma for recording in recordings if recording.sigma is not None})
    return [None, *((lower + upper) / 2 for lower, upper in pairwise(sigmas))]


def _table(
    recordings: Recordings, level: float | None, errors: np.ndarray, costs: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Average over steps, `[options, windows, modules, heads]`; steps above a noise level take the last window."""
    sigma = {recording.step: recording.sigma for recording in recordings}
    dense = np.array([level is not None and sigma[step] > level for step in recordings.steps])[:, None]
    return tuple(np.where(dense, x[:, -1:], x).mean(3) for x in (errors, costs))


def _errors(measured: Measured) -> np.ndarray:
    """Return what each head adds to the squared relative error: a mean over prompts, `[modules, steps, heads]`."""
    relative = measured.error / np.nansum(measured.exact, -1, keepdims=True)
    return np.nan_to_num(mean_of_present(relative, 0)) / relative.shape[1]


def _config(
    recordings: Recordings,
    found: Selection,
    options: Sequence[dict[str, Any]],
    windows: Sequence[int],
    levels: Sequence[float | None],
) -> DMAConfig:
    """Write a choice as a configuration: what most modules share, and what each has of its own."""
    fields = {}
    heads = {recording.module: recording.shape[1] for recording in recordings}
    for name, option, of_heads in zip(recordings.modules, found.option, found.window, strict=True):
        widths = [windows[number] for number in of_heads[: heads[name]]]
        if set(widths) == {EVERY_KEY}:
            fields[name] = {"high": options[option]["high"], "dense": True}
        else:
            window = widths[0] if len(set(widths)) == 1 else tuple(widths)
            fields[name] = {**options[option], "window": window}
    common = {}
    for key in ("high", "low", "sink", "window"):
        shared = [own[key] for own in fields.values() if key in own and not isinstance(own[key], tuple)]
        if shared:
            common[key] = Counter(shared).most_common(1)[0][0]
    own = {
        name: {key: value for key, value in changes.items() if common.get(key) != value}
        for name, changes in fields.items()
    }
    modules = {name: own.get(name, {}) for name in recordings.settings["model"]["modules"]}
    return DMAConfig(
        **common, dense_above_sigma=levels[found.level], modules=modules,
        model=recordings.settings["model"]["class"],
    )  # fmt: skip
