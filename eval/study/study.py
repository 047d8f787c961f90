"""A study measures every format on a model's recorded tensors, and sums up what it found."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from dma_diffusers.eval.intervals import bootstrap
from dma_diffusers.eval.recordings.store import Recordings, Tensors
from dma_diffusers.eval.study import attention, linears
from dma_diffusers.eval.study.blocks import QUANTILES, Sums
from dma_diffusers.eval.study.options import Options, Variant

QUANTITIES = ("qsnr", "predicted_qsnr", "relative_l2")
FEWEST = 3
"""An interval needs so many prompts."""


class Place(NamedTuple):
    """An attention module or a linear layer, at a denoising step of the recorded drawings."""

    layer: str
    step: int


class Tensor(NamedTuple):
    """A tensor whose crest factors are taken, in blocks of this many numbers."""

    part: str
    block: int
    rotation: str
    smooth: bool


@dataclass
class Study:
    """The sums of each variant and the quantiles of κ, prompt by prompt.

    sigmas: the noise level (0 to 1; None if not known) of each step.
    """

    sigmas: dict[int, float | None]
    sums: dict[Place, dict[Variant, dict[int, Sums]]] = field(default_factory=lambda: defaultdict(dict))
    crests: dict[Place, dict[Tensor, dict[int, list[float]]]] = field(
        default_factory=lambda: defaultdict(dict)
    )

    def add(
        self,
        prompt: int,
        place: Place,
        found: Mapping[Variant, Sums],
        crests: Mapping[tuple[str, int, str, bool], list[float]],
    ) -> None:
        """Add what was found in a call; sums add up, of quantiles the prompt's first call has the word."""
        for variant, sums in found.items():
            of_prompts = self.sums[place].setdefault(variant, {})
            of_prompts[prompt] = of_prompts.get(prompt, Sums()) + sums
        for tensor, quantiles in crests.items():
            self.crests[place].setdefault(Tensor(*tensor), {}).setdefault(prompt, quantiles)

    @property
    def prompts(self) -> list[int]:
        """Return the numbers of the prompts."""
        return sorted(
            {prompt for place in self.sums.values() for found in place.values() for prompt in found}
        )

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield for each layer, step and variant the means of `QUANTITIES` over prompts; None for what is not there."""
        for place, of_variants in self.sums.items():
            for variant, of_prompts in of_variants.items():
                values = {name: _present(of_prompts.values(), name) for name in QUANTITIES}
                yield (
                    {"layer": place.layer, "sigma": self.sigmas.get(place.step), "step": place.step}
                    | variant._asdict()
                    | {name: float(np.mean(found)) if found else None for name, found in values.items()}
                )

    def crest_rows(self) -> Iterator[dict[str, Any]]:
        """Yield for each layer, step and tensor the quantiles of κ, means over prompts."""
        for place, of_tensors in self.crests.items():
            for tensor, of_prompts in of_tensors.items():
                quantiles = np.mean(list(of_prompts.values()), 0).tolist()
                yield (
                    {"layer": place.layer, "sigma": self.sigmas.get(place.step), "step": place.step}
                    | tensor._asdict()
                    | {f"q{round(100 * q):02d}": value for q, value in zip(QUANTILES, quantiles, strict=True)}
                )

    def of_prompts(self, variant: Variant, quantity: str) -> list[float]:
        """Return for each prompt the mean of a quantity over layers and steps; [] where no layer has the variant."""
        found: dict[int, list[float]] = defaultdict(list)
        for of_variants in self.sums.values():
            for prompt, sums in of_variants.get(variant, {}).items():
                if (value := getattr(sums, quantity)) is not None:
                    found[prompt].append(value)
        return [float(np.mean(found[prompt])) for prompt in sorted(found)]

    def summary(self) -> Iterator[dict[str, Any]]:
        """Yield for each variant the means of `QUANTITIES` over everything, with 95 % intervals over prompts."""
        for variant in dict.fromkeys(variant for place in self.sums.values() for variant in place):
            row: dict[str, Any] = variant._asdict()
            for quantity in QUANTITIES:
                row[quantity] = interval(self.of_prompts(variant, quantity))
            yield row


def interval(values: Sequence[float]) -> list[float] | None:
    """Return the mean and its bounds, the mean alone of fewer than `FEWEST` prompts, None of none."""
    if not values:
        return None
    return list(bootstrap([values], resamples=2000)) if len(values) >= FEWEST else [float(np.mean(values))]


def study(
    recordings: Recordings,
    options: Options,
    taken: Sequence[linears.Sample] = (),
    device: torch.device | str | None = None,
    on_step: Callable[[str, int, int], None] = lambda title, done, total: None,
) -> Study:
    """Measure every variant on recorded attention calls, and on samples of linear layers.

    Of guidance that runs the transformer twice in a step, the first call is taken. device: where attention is measured;
    the GPU if there is one, by default. Raises ValueError, in one line, for no recordings, a damaged one, and for a
    rotation that the model's heads can't have.
    """
    chosen = [recording for recording in recordings if recording.call == 0]
    if not chosen:
        raise ValueError(f"there are no recordings in {recordings.folder}")
    for recording in chosen:
        options.of_head_dim(recording.shape[-1])
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    found = Study({recording.step: recording.sigma for recording in chosen})
    with torch.no_grad():
        for done, recording in enumerate(chosen, 1):
            tensors = Tensors(*(x if x is None else x.to(device) for x in recordings.tensors(recording)))
            for call in attention.calls(recording, tensors, seed=done):
                of_call = attention.measure(call, options), attention.crests(call, options)
                found.add(recording.prompt, Place(recording.module, recording.step), *of_call)
            on_step("measuring attention", done, len(chosen))
        for sample, sums, crests in linears.measure(taken, options, on_step):
            found.add(sample.prompt, Place(sample.layer, sample.step), sums, crests)
    return found


def _present(of_prompts: Any, quantity: str) -> list[float]:
    return [value for sums in of_prompts if (value := getattr(sums, quantity)) is not None]
