"""Calibration chooses formats and policies, module by module and range by range, within an error budget."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from dma_diffusers.config import DMAConfig
from dma_diffusers.eval.cost import check_target, current_target
from dma_diffusers.eval.linears.options import Item, choice_of
from dma_diffusers.eval.recordings import cost
from dma_diffusers.eval.recordings.configuration import AS_CHOSEN, OfModule, configuration, of_modules
from dma_diffusers.eval.recordings.measure import Measured, mean_of_present, measure
from dma_diffusers.eval.recordings.options import policies, ranges
from dma_diffusers.eval.recordings.policy import Choice, EntryFound, Policy
from dma_diffusers.eval.recordings.search import Search
from dma_diffusers.eval.recordings.store import Recordings
from dma_diffusers.kernels.defaults import FORMAT_PAIRS
from dma_diffusers.kernels.tiling.policies import Policy as TilePolicy
from dma_diffusers.policy_file import check_quality

LADDER = (0.0, 0.25, 0.5, 0.75, 1.0)
HELD_OUT = 4
"""Every fourth recorded prompt is held out: the choice is measured on it."""


def calibrate(
    recordings: Recordings,
    quality: float,
    *,
    target: str | None = None,
    formats: Sequence[tuple[str, str]] | None = None,
    rotation: str = "none",
    linears: Sequence[Item] = (),
    device: torch.device | str | None = None,
    on_step: Callable[[str, int, int], None] = lambda title, done, total: None,
) -> Policy:
    """Find the cheapest choice within the error budget of `quality`, and those of a ladder of other qualities.

    quality: 1 allows no more error than the most precise options make, 0 as much as the cheapest; between them the
    budget's logarithm is linear. target: the GPU to be fast on, by architecture; this machine's if its rates are known,
    else sm_100. formats: the pairs (HIGH, LOW) to choose from, the target's own by default. rotation: of q and k,
    everywhere.
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
    if not len(recordings):
        raise ValueError(f"there are no recordings in {recordings.folder}")
    pairs = tuple((high, low) for high, low in formats or FORMAT_PAIRS[target])
    calibration = _Calibration(recordings, target, pairs, rotation, linears, device, on_step)
    choices = calibration.choices(sorted({*LADDER, float(quality)}))
    about = ("pipeline", "prompts", "seeds", "call", "steps", "versions", "hardware")
    evidence = {
        "target": target, "formats": pairs, "rotation": rotation,
        "policies": [str(policy) for policy in calibration.options],
        "prompts_recorded": len(recordings.prompts), "prompts_held_out": calibration.held_out,
        **{name: recordings.settings[name] for name in about},
    }  # fmt: skip
    return Policy(float(quality), recordings.settings["model"], choices, evidence)


@dataclass(frozen=True)
class _Calibration:
    """A calibration chooses from these; they are arguments of `calibrate`."""

    recordings: Recordings
    target: str
    formats: tuple[tuple[str, str], ...]
    rotation: str
    linears: Sequence[Item]
    device: torch.device | str | None
    on_step: Callable[[str, int, int], None]

    @property
    def held_out(self) -> list[int]:
        """Return the prompts that are not chosen by."""
        return self.recordings.prompts[HELD_OUT - 1 :: HELD_OUT]

    @cached_property
    def seen(self) -> Recordings:
        """Return the recordings that are chosen by."""
        chosen_by = [each for each in self.recordings if each.prompt not in self.held_out]
        return replace(self.recordings, recordings=chosen_by)

    @property
    def options(self) -> list[TilePolicy]:
        """Return the policies to choose from, group by group; some stand in several groups."""
        return [policy for group in policies(self.seen) for policy in group]

    @property
    def share(self) -> float:
        """Return the share of attention modules among everything that errs."""
        return len(self.seen.modules) / self.parts

    @property
    def parts(self) -> int:
        """Return the number of everything that errs: attention modules and linear layers."""
        return len(self.seen.modules) + sum(len(item.layers) for item in self.linears)

    @cached_property
    def whole(self) -> float:
        """Return the clocks of everything in bf16."""
        return cost.full_precision_clocks(self.seen, self.target) + sum(
            item.costs[0] for item in self.linears
        )

    def choices(self, rungs: Sequence[float]) -> tuple[Choice, ...]:
        """Return a choice for each of these qualities."""
        search = self._search()
        budgets = {rung: search.most ** (1 - rung) * search.least**rung for rung in rungs}
        aims, choices = dict(budgets), {}
        while waiting := [rung for rung in rungs if rung not in choices]:
            found = {rung: search.within(aims[rung] * (1 + 1e-9)) for rung in waiting}
            chosen = {
                rung: of_modules(self.seen, found[rung], self.formats, self.options, ranges(self.seen))
                for rung in waiting
            }
            runs = {
                f"{rung}": DMAConfig.of(self._configuration(chosen[rung]), min_length=0) for rung in waiting
            }
            measured = measure(self.recordings, runs, self.device, self._shown("measuring choices"))
            for rung in waiting:
                made = self._choice(rung, budgets[rung], chosen[rung], measured[f"{rung}"], found[rung].ways)
                error = made.relative_l2**2
                if error > 1.001 * budgets[rung] and aims[rung] > search.least:
                    # This choice is not found again.
                    aims[rung] = 0.99 * budgets[rung] / error * search.error(found[rung])
                else:
                    choices[rung] = made
        return tuple(choices[rung] for rung in rungs)

    def _search(self) -> Search:
        """Measure every option alone, in all modules at all noise levels."""
        names = [(*pair, str(policy)) for pair in self.formats for policy in self.options]
        candidates = {
            " ".join(name): DMAConfig(
                high=name[0], low=name[1], policy=name[2], rotation=self.rotation, min_length=0, **AS_CHOSEN
            )
            for name in names
        }
        costs = {
            name: cost.head_clocks(self.seen, config, self.target) for name, config in candidates.items()
        }
        measured = measure(self.seen, candidates, self.device, self._shown("measuring options"))
        errors = {name: _errors(values) for name, values in measured.items()}
        return Search(
            self.share * self._of_ranges([errors[" ".join(name)] for name in names]),
            self._of_ranges([costs[" ".join(name)] for name in names]) / self.whole,
            [len(group) for group in policies(self.seen)],
            [(item.errors / self.parts, item.costs / self.whole) for item in self.linears],
        )

    def _of_ranges(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """Return what each range adds to the mean over steps, `[formats, options, modules, ranges, heads]`.

        values: `[modules, steps, heads]` of each option with each of the formats.
        """
        steps = self.seen.steps
        stacked = np.stack(values).reshape(len(self.formats), -1, *values[0].shape) / len(steps)
        return np.stack(
            [stacked[:, :, :, np.isin(steps, level.steps)].sum(3) for level in ranges(self.seen)], 3
        )

    def _choice(
        self, rung: float, budget: float, chosen: Mapping[str, OfModule], measured: Measured, ways: np.ndarray
    ) -> Choice:
        """Return what a choice costs, and what it errs on both kinds of prompts."""
        config = self._configuration(chosen)
        of_linears = choice_of(self.linears, ways) if self.linears else None
        by_linears = (1 - self.share) * of_linears.relative_l2**2 if of_linears else 0.0
        is_held_out = np.isin(self.recordings.prompts, self.held_out)
        seen, held_out = measured.of_prompts(~is_held_out), measured.of_prompts(is_held_out)
        of_attention, of_held_out = (float(_errors(values).mean(1).sum()) for values in (seen, held_out))
        clocks = cost.head_clocks(self.seen, config, self.target).mean(1).sum()
        clocks += of_linears.clocks if of_linears else 0
        by_module = mean_of_present(seen.of_modules, (0, 2)).tolist()
        return Choice(
            rung, config, budget**0.5, (self.share * of_attention + by_linears) ** 0.5,
            (self.share * of_held_out + by_linears) ** 0.5 if self.held_out else None,
            float(clocks / self.whole), float(mean_of_present(seen.recall, (0, 1, 2, 3))),
            dict(zip(self.seen.modules, by_module, strict=True)), self._entries(chosen, config, seen),
            of_attention**0.5, of_linears,
        )  # fmt: skip

    def _configuration(self, chosen: Mapping[str, OfModule]) -> DMAConfig:
        """Return the configuration of a choice, with the rotation of all."""
        return DMAConfig.of(configuration(self.seen, chosen), rotation=self.rotation)

    def _entries(
        self, chosen: Mapping[str, OfModule], config: DMAConfig, measured: Measured
    ) -> tuple[EntryFound, ...]:
        """Return what each module's policies cost and err, in each range of noise levels."""
        pairs, whole = cost.class_pairs(self.seen, config), cost.module_clocks(self.seen, self.target)
        clocks = cost.head_clocks(self.seen, config, self.target).sum(-1)
        found = []
        for number, (name, (formats, entries)) in enumerate(chosen.items()):
            for (above, steps), policy in entries:
                there = number, np.isin(self.seen.steps, steps)
                error = float(mean_of_present(measured.of_modules[:, *there] ** 2, (0, 1))) ** 0.5
                relative_cost = float(clocks[there].sum() / whole[there].sum())
                of_classes = pairs[there].sum(0).tolist()
                words = "|".join(formats), str(policy)
                found.append(EntryFound(name, above, *words, relative_cost, error, of_classes))
        return tuple(found)

    def _shown(self, title: str) -> Callable[[str, int, int], None]:
        """Return what shows a measurement's progress under this title."""
        return lambda _, done, total: self.on_step(title, done, total)


def _errors(measured: Measured) -> np.ndarray:
    """Return what each head adds to the squared relative error: a mean over prompts, `[modules, steps, heads]`."""
    relative = measured.error / np.nansum(measured.exact, -1, keepdims=True)
    return np.nan_to_num(mean_of_present(relative, 0)) / relative.shape[1]
