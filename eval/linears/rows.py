"""Rows of the inputs of linear layers, sampled while a pipeline draws in full precision."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from dma_diffusers.eval.recordings.record import draw_observed
from dma_diffusers.linears.exclusions import choose
from dma_diffusers.linears.quantise import quantisable

ROWS = 32
"""So many rows are kept of an input in each call of the model."""


class Rows:
    """Rows of each input, on the CPU in the model's dtype, by the name of the layer that read it first.

    wanted: says which denoising steps are sampled. of_prompt: of each prompt, the rows `[n, K]` of each input.
    first: of each layer, the one that read its input first. tokens: of each input, how many rows its layers were given
    in all of the sampled steps. steps: the number of those, over all prompts.
    """

    def __init__(self, wanted: Callable[[int], bool] = lambda step: True):
        self.wanted = wanted
        self.of_prompt: list[dict[str, list[Tensor]]] = []
        self.first: dict[str, str] = {}
        self.tokens: dict[str, int] = defaultdict(int)
        self.steps = 0
        self.is_sampled = False

    def prompt_begins(self) -> None:
        """Take note that the next steps belong to another prompt."""
        self.of_prompt.append(defaultdict(list))

    def step_begins(self, step: int) -> None:
        """Take note that this denoising step, counted from 0, is next; it is sampled if it is wanted."""
        self.is_sampled = self.wanted(step)
        self.steps += self.is_sampled

    def inputs(self, layer: str) -> list[Tensor]:
        """The rows `[n, K]` of a layer's input, one tensor for each prompt in which it ran."""
        first = self.first.get(layer)
        return [torch.cat(rows[first]) for rows in self.of_prompt if first in rows]

    def add(self, layer: str, x: Tensor) -> None:
        """Add some of the rows of x `[..., K]`, the input of a call, if its step is sampled."""
        if not self.is_sampled:
            return
        rows = x.detach().flatten(0, -2)
        self.tokens[layer] += len(rows)
        kept = self.of_prompt[-1][layer]
        generator = torch.Generator().manual_seed(len(kept))
        some = torch.randperm(len(rows), generator=generator)[:ROWS]
        kept.append(rows[some.to(rows.device)].cpu())


@contextmanager
def sampling(rows: Rows, layers: Mapping[str, torch.nn.Linear]) -> Iterator[None]:
    """A context in which the inputs of `layers` are sampled; one that the layer before read, too, is sampled once."""
    last: tuple[Tensor | None, str] = None, ""

    def reader(name: str) -> Callable[[torch.nn.Module, tuple], None]:
        def read(layer: torch.nn.Module, args: tuple) -> None:
            nonlocal last
            if last[0] is not args[0]:
                last = args[0], name
                rows.add(name, args[0])
            rows.first[name] = last[1]

        return read

    hooks = [layer.register_forward_pre_hook(reader(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def draw_sampled(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    call: dict[str, Any],
    rows: Rows,
    on_step: Callable[[str, int, int], None],
) -> None:
    """Draw prompts down to their latents, and sample the inputs of all linear layers that would be quantised."""
    layers = {
        prefix + name: layer
        for prefix, model in quantisable(pipe)
        for name, layer in choose(model).layers.items()
    }
    with sampling(rows, layers):
        for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True), 1):
            rows.prompt_begins()
            show = partial(on_step, f"observing linear layers {number} of {len(prompts)}")
            draw_observed(pipe, call, prompt, seed, show, rows)
