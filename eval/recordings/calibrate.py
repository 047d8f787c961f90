"""Calibration chooses formats and policies, module by module and range by range, within an error budget."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from dma_diffusers.config import DMAConfig
from dma_diffusers.eval.cost import check_target, current_target
from dma_diffusers.eval.linears.options import Item, choice_of
from dma_diffusers.eval.recordings import cost
from dma_diffusers.eval.recordings.configuration import AS_CHOSEN, OfModule, configuration, of_modules
from dma_diffusers.eval.recordings.measure import Measured, mean_of_present, measure
from dma_diffusers.eval.recordings.options import Range, policies, ranges
from dma_diffusers.eval.recordings.policy import Choice, EntryFound, Policy
from dma_diffusers.eval.recordings.search import Search
from dma_diffusers.eval.recordings.store import Recordings
from dma_diffusers.kernels.defaults import FORMAT_PAIRS
from dma_diffusers.policy_file import check_quality

LADDER = (0.0, 0.25, 0.5, 0.75, 1.0)
HELD_OUT = 4
"""Of so many recorded prompts, one is kept to measure the choice on."""


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
    policy in each range of noise levels and its best formats, every input of linear layers its best way (`Search`). The
    choice is then measured as it is, all heads of a call together, and made anew with less to spend where it errs by
    more than the budget (to a thousandth). Every fourth prompt is held out: the choice is measured on those, too.
    Raises ValueError for no recordings, an unknown target, or formats that it has no kernel for.
    """
    check_quality(quality)
    target = target or current_target()
    check_target(target)
    pairs = [tuple(pair) for pair in formats or FORMAT_PAIRS[target]]
    if not len(recordings):
        raise ValueError(f"there are no recordings in {recordings.folder}")
    held_out = recordings.prompts[HELD_OUT - 1 :: HELD_OUT]
    seen = replace(recordings, recordings=[each for each in recordings if each.prompt not in held_out])
    groups, levels = policies(seen), ranges(seen)
    options = [policy for group in groups for policy in group]
    names = [(*pair, policy) for pair in pairs for policy in options]  # some policies stand in several groups
    candidates = {
        str(name): DMAConfig(
            **dict(zip(("high", "low", "policy"), name, strict=True)), min_length=0, **AS_CHOSEN
        )
        for name in names
    }
    whole = cost.full_precision_clocks(seen, target) + sum(item.costs[0] for item in linears)
    parts = len(seen.modules) + sum(len(item.layers) for item in linears)
    share = len(seen.modules) / parts
    costs = {name: cost.head_clocks(seen, config, target) / whole for name, config in candidates.items()}
    measured = measure(seen, candidates, device, partial(_titled, on_step, "measuring options"))
    errors = {name: share * _errors(values) for name, values in measured.items()}
    search = Search(
        *(
            _of_ranges(seen, [values[str(name)] for name in names], levels, len(options))
            for values in (errors, costs)
        ),
        [len(group) for group in groups],
        [(item.errors / parts, item.costs / whole) for item in linears],
    )

    rungs = sorted({*LADDER, float(quality)})
    budgets = {rung: search.most ** (1 - rung) * search.least**rung for rung in rungs}
    aims, choices = dict(budgets), {}
    while waiting := [rung for rung in rungs if rung not in choices]:
        found = {rung: search.within(aims[rung] * (1 + 1e-9)) for rung in waiting}
        chosen = {rung: of_modules(seen, found[rung], pairs, options, levels) for rung in waiting}
        configs = {rung: configuration(seen, chosen[rung]) for rung in waiting}
        runs = {f"{rung}": DMAConfig.of(config, min_length=0) for rung, config in configs.items()}
        results = measure(recordings, runs, device, partial(_titled, on_step, "measuring choices"))
        for rung, values in zip(waiting, results.values(), strict=True):
            of_linears = choice_of(linears, found[rung].ways) if linears else None
            by_linears = (1 - share) * of_linears.relative_l2**2 if of_linears else 0.0
            is_held_out = np.isin(recordings.prompts, held_out)
            there, elsewhere = values.of_prompts(~is_held_out), values.of_prompts(is_held_out)
            of_attention = float(_errors(there).mean(1).sum())
            error = share * of_attention + by_linears
            if error > 1.001 * budgets[rung] and aims[rung] > search.least:
                # This choice is not found again.
                aims[rung] = 0.99 * budgets[rung] / error * search.error(found[rung])
                continue
            clocks = cost.head_clocks(seen, configs[rung], target).mean(1).sum()
            clocks += of_linears.clocks if of_linears else 0
            error_held_out = share * float(_errors(elsewhere).mean(1).sum()) + by_linears
            by_module = mean_of_present(there.of_modules, (0, 2)).tolist()
            choices[rung] = Choice(
                rung, configs[rung], budgets[rung] ** 0.5, error**0.5,
                error_held_out**0.5 if held_out else None, float(clocks / whole),
                float(mean_of_present(there.recall, (0, 1, 2, 3))),
                dict(zip(seen.modules, by_module, strict=True)),
                _entries(seen, chosen[rung], configs[rung], there, target), of_attention**0.5, of_linears,
            )  # fmt: skip
    about = ("pipeline", "prompts", "seeds", "call", "steps", "versions", "hardware")
    evidence = {
        "target": target, "formats": pairs, "policies": [str(policy) for policy in options],
        "prompts_recorded": len(recordings.prompts), "prompts_held_out": held_out,
        **{name: recordings.settings[name] for name in about},
    }  # fmt: skip
    ladder = tuple(choices[rung] for rung in rungs)
    return Policy(float(quality), recordings.settings["model"], ladder, evidence)


def _of_ranges(
    recordings: Recordings, values: Sequence[np.ndarray], levels: Sequence[Range], options: int
) -> np.ndarray:
    """Return what each range adds to the mean over steps, `[formats, options, modules, ranges, heads]`.

    values: `[modules, steps, heads]` of each candidate.
    """
    steps = recordings.steps
    stacked = np.stack(values).reshape(-1, options, *values[0].shape) / len(steps)
    of_ranges = [stacked[:, :, :, np.isin(steps, level.steps)].sum(3) for level in levels]
    return np.stack(of_ranges, 3)


def _entries(
    recordings: Recordings,
    chosen: Mapping[str, OfModule],
    config: DMAConfig,
    measured: Measured,
    target: str,
) -> tuple[EntryFound, ...]:
    """Return what each module's policies cost and err, in each range of noise levels."""
    pairs, whole = cost.class_pairs(recordings, config), cost.module_clocks(recordings, target)
    clocks, square = cost.head_clocks(recordings, config, target).sum(-1), measured.of_modules**2
    found = []
    for number, (name, (formats, entries)) in enumerate(chosen.items()):
        for (above, steps), policy in entries:
            there = number, np.isin(recordings.steps, steps)
            error = float(mean_of_present(square[:, *there], (0, 1))) ** 0.5
            relative_cost = float(clocks[there].sum() / whole[there].sum())
            of_classes = pairs[there].sum(0).tolist()
            words = "|".join(formats), str(policy)
            found.append(EntryFound(name, above, *words, relative_cost, error, of_classes))
    return tuple(found)


def _errors(measured: Measured) -> np.ndarray:
    """Return what each head adds to the squared relative error: a mean over prompts, `[modules, steps, heads]`."""
    relative = measured.error / np.nansum(measured.exact, -1, keepdims=True)
    return np.nan_to_num(mean_of_present(relative, 0)) / relative.shape[1]


def _titled(on_step: Callable[[str, int, int], None], title: str, _: str, done: int, total: int) -> None:
    """Show a measurement's progress under this title."""
    on_step(title, done, total)
