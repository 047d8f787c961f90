"""Linear layers in every format: what their inputs lose, and what their outputs lose with weights rounded as well."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from dma_diffusers.eval.linears.rows import Rows, draw_sampled
from dma_diffusers.eval.recordings.store import Recordings
from dma_diffusers.eval.study.blocks import Sums, crest_quantiles, sums
from dma_diffusers.eval.study.options import Options, Variant
from dma_diffusers.kernels.formats import fake_quantize, get_format, rotate
from dma_diffusers.linears.exclusions import choose
from dma_diffusers.linears.quantise import quantisable

_ROTATIONS = ("none", "hadamard16", "hadamard32")  # head_dim is a rotation of heads
_CREST_BLOCKS = (16, 32)


class Sample(NamedTuple):
    """Rows of the input of one layer at one step of a prompt, float32 `[n, K]`, and the layer's weight `[N, K]`."""

    prompt: int
    step: int
    layer: str
    rows: Tensor
    weight: Tensor


class _RowsOfSteps(Rows):
    """Rows of each step of each prompt, apart; `places` has the prompt and the step of each entry of `of_prompt`."""

    def __init__(self, wanted: Callable[[int], bool]):
        super().__init__(wanted)
        self.places: list[tuple[int, int]] = []
        self.prompt = -1

    def prompt_begins(self) -> None:
        self.prompt += 1

    def step_begins(self, step: int) -> None:
        super().step_begins(step)
        if self.is_sampled:
            self.of_prompt.append(defaultdict(list))
            self.places.append((self.prompt, step))


def samples(
    pipe: DiffusionPipeline,
    recordings: Recordings,
    call: dict[str, Any],
    on_step: Callable[[str, int, int], None] = lambda title, done, total: None,
) -> list[Sample]:
    """Draw the recorded prompts again, and sample the inputs of linear layers at the recorded steps."""
    rows = _RowsOfSteps(recordings.steps.__contains__)
    prompts, seeds = (
        [recordings.settings[name][i] for i in recordings.prompts] for name in ("prompts", "seeds")
    )
    draw_sampled(pipe, prompts, seeds, call, rows, on_step)
    weights = {
        prefix + name: layer.weight.detach()
        for prefix, model in quantisable(pipe)
        for name, layer in choose(model).layers.items()
    }
    return [
        Sample(
            recordings.prompts[prompt], step, layer, torch.cat(of_place[rows.first[layer]]).float(), weight
        )
        for (prompt, step), of_place in zip(rows.places, rows.of_prompt, strict=True)
        for layer, weight in weights.items()
        if rows.first.get(layer) in of_place
    ]


def measure(
    taken: Sequence[Sample], options: Options, on_step: Callable[[str, int, int], None]
) -> Iterator[tuple[Sample, dict[Variant, Sums], dict[tuple[str, int, str, bool], list[float]]]]:
    """Yield each sample with the sums of its variants and the quantiles of κ, layer by layer."""
    named = [
        format for format in map(get_format, options.formats) if format.block_rows == 1
    ]  # rows are sampled
    by_layer: dict[str, list[Sample]] = defaultdict(list)
    for sample in taken:
        by_layer[sample.layer].append(sample)
    for done, of_layer in enumerate(by_layer.values(), 1):
        weight = of_layer[0].weight.float().cpu()
        exact = [sample.rows @ weight.mT for sample in of_layer]
        found: list[dict[Variant, Sums]] = [{} for _ in of_layer]
        crests: list[dict] = [{} for _ in of_layer]
        for rotation in (name for name in _ROTATIONS if name in (options.rotations or _ROTATIONS)):
            rotated, inputs = rotate(weight, rotation), [rotate(sample.rows, rotation) for sample in of_layer]
            for number, x in enumerate(inputs):
                for block in _CREST_BLOCKS:
                    crests[number]["linear", block, rotation, False] = crest_quantiles(x, block)
            for format in named:
                rounded_weight = fake_quantize(rotated, format).mT
                for number, x in enumerate(inputs):
                    rounded = fake_quantize(x, format)
                    error, norm = (
                        float(each.double().square().sum())
                        for each in (rounded @ rounded_weight - exact[number], exact[number])
                    )
                    lost = sums(x, format, rounded) + Sums(output_error=error, output_norm=norm)
                    found[number][Variant("linear", format.name, rotation)] = lost
        yield from zip(of_layer, found, crests, strict=True)
        on_step("measuring linear layers", done, len(by_layer))
