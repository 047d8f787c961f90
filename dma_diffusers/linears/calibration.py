"""Calibration: statistics of the inputs of linear layers, over prompts and noise levels."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dma_diffusers.config import DMAConfig
from dma_diffusers.errors import first_line
from dma_diffusers.families import known_family
from dma_diffusers.forward import ForwardContext
from dma_diffusers.linears.allocation import FACTORS, FORMATS, Shares, threshold
from dma_diffusers.progress import OnStep

STEPS = 8
"""The denoising steps of a prompt, unless the call says otherwise: they spread over all noise levels."""
_CHUNK = 2**24  # elements that are counted at once


@dataclass
class InputStatistics:
    """The statistics of one input, or of several that one layer read.

    total: float64 `[K]`, the sum of |x| over tokens. tokens: their number. amax: the largest |x|.
    under: of each noise level, the number of calls, and the sum over calls of the shares of elements under T(4) and
    T(6) at each of `FACTORS`, float64 `[2, len(FACTORS)]`.
    """

    total: Tensor
    tokens: int = 0
    amax: float = 0.0
    under: dict[float, tuple[int, Tensor]] = field(default_factory=dict)

    @property
    def mean_abs(self) -> Tensor:
        """The mean |x| of each channel."""
        return self.total / self.tokens

    def shares(self, level: float | None = None) -> Shares:
        """The shares of elements, averaged over the calls at a noise level, or over all calls."""
        taken = list(self.under.values()) if level is None else [self.under[level]]
        calls = sum(calls for calls, _ in taken)
        four, six = (
            sum((total for _, total in taken), torch.zeros(2, len(FACTORS), dtype=torch.float64)) / calls
        )
        return Shares(four, six)

    def add(self, x: Tensor, level: float) -> None:
        """Adds a call's input `[..., K]`, which is finite."""
        x = x.detach().abs().flatten(0, -2)
        largest = x.amax()
        self.total += x.sum(0, dtype=torch.float64).cpu()
        self.tokens += len(x)
        self.amax = max(self.amax, float(largest))
        calls, total = self.under.get(level, (0, torch.zeros(2, len(FACTORS), dtype=torch.float64)))
        self.under[level] = (calls + 1, total + _under(x.flatten(), largest))

    def merged(self, other: "InputStatistics") -> "InputStatistics":
        """The statistics of both inputs."""
        under = dict(self.under)
        for level, (calls, total) in other.under.items():
            before, sum_before = under.get(level, (0, torch.zeros_like(total)))
            under[level] = (before + calls, sum_before + total)
        amax = max(self.amax, other.amax)
        return InputStatistics(self.total + other.total, self.tokens + other.tokens, amax, under)


@dataclass
class Calibration:
    """The observations of calibration on one model.

    inputs: the statistics of each input that was quantised, by the name of the first layer that read it.
    readers: of each layer, the names of the layers that first read its inputs: its own, or that of a layer that read
    the very same tensors. tells_noise: whether levels are noise levels (sigma, 0 to 1), not numbers of calls.
    """

    inputs: dict[str, InputStatistics] = field(default_factory=dict)
    readers: dict[str, set[str]] = field(default_factory=dict)
    tells_noise: bool = True

    def shared(self, layer: str) -> str:
        """The name under which layers with the same input go; a layer whose partners change goes alone."""
        first = self.readers[layer]
        return next(iter(first)) if len(first) == 1 else layer

    def is_read_again(self, layer: str, layers: Collection[str]) -> bool:
        """Tells whether one of `layers` reads the same tensor after this one: they are in the order of calls."""
        together = [
            name for name in self.readers if name in layers and self.shared(name) == self.shared(layer)
        ]
        return layer != together[-1]

    def statistics(self, layer: str) -> InputStatistics:
        """The statistics of a layer's input. Raises KeyError for a layer that was not seen."""
        found, *others = (self.inputs[first] for first in sorted(self.readers[layer]))
        for other in others:
            found = found.merged(other)
        return found

    def over_time(self, factor: float = 1.0) -> dict[str, Any]:
        """The shares of 4, 6 and 8 bits of each layer at each noise level, as plain numbers for JSON.

        factor: of the thresholds. `layers` has for each layer a row `[4 bits, 6 bits, 8 bits]` for each of `levels`,
        from pure noise on; None where the layer was not called.
        """
        levels = sorted(
            {level for each in self.inputs.values() for level in each.under}, reverse=self.tells_noise
        )
        layers = {}
        for layer in self.readers:
            found = self.statistics(layer)
            layers[layer] = [
                list(found.shares(level).at(factor)) if level in found.under else None for level in levels
            ]
        return {"levels": levels, "tells_noise": self.tells_noise, "factor": factor, "layers": layers}


class observe:  # a context, like those of contextlib
    """A context in which the calls of `model` are observed; it yields the `Calibration`.

    layers, blocks: as in `exclusions.Choice`. describe: names what runs, for errors.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        layers: Mapping[str, torch.nn.Linear],
        blocks: Mapping[str, str],
        describe: Callable[[], str],
    ):
        self.model, self.layers, self.blocks, self.describe = model, layers, blocks, describe
        family = known_family(model)
        self.context = ForwardContext(model, family, DMAConfig()) if family else None
        self.calibration = Calibration(tells_noise=bool(family and family.timestep_scale))
        self.level = 0.0
        self.calls = 0
        # The last input of each block, and the layer that read it first; it is the order of calls that counts.
        self.last: dict[str, tuple[Tensor, str]] = {}

    def __enter__(self) -> Calibration:
        self.hooks = [
            self.model.register_forward_pre_hook(self._begin, with_kwargs=True),
            self.model.register_forward_hook(self._end, always_call=True),
        ]
        for name, layer in self.layers.items():
            self.hooks.append(layer.register_forward_pre_hook(self._reader(name)))
        return self.calibration

    def __exit__(self, *_: Any) -> None:
        for hook in self.hooks:
            hook.remove()
        self.last.clear()

    def _begin(self, model: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        sigma = self.context.noise_level(args, kwargs) if self.context else None
        self.level = round(float(sigma), 4) if sigma is not None else float(self.calls)
        self.calls += 1

    def _end(self, model: torch.nn.Module, args: tuple, output: Any) -> None:
        self.last.clear()

    def _reader(self, name: str) -> Callable[[torch.nn.Module, tuple], None]:
        def read(layer: torch.nn.Module, args: tuple) -> None:
            x, block = args[0], self.blocks[name]
            seen, first = self.last.get(block, (None, name))
            if seen is not x:
                first = name
                self._add(name, x)
                self.last[block] = (x, name)
            self.calibration.readers.setdefault(name, set()).add(first)

        return read

    def _add(self, name: str, x: Tensor) -> None:
        if not bool(x.isfinite().all()):
            raise ValueError(f"{name} was given NaN or infinity by {self.describe()}")
        if name not in self.calibration.inputs:
            self.calibration.inputs[name] = InputStatistics(torch.zeros(x.shape[-1], dtype=torch.float64))
        self.calibration.inputs[name].add(x, self.level)


def _under(x: Tensor, largest: Tensor) -> Tensor:
    """The shares of |x| `[n]` under T(4) and T(6) at each of `FACTORS`, float64 `[2, len(FACTORS)]` on the CPU."""
    relative = torch.tensor([threshold(format) for format in FORMATS[:2]], dtype=torch.float64)
    edges = (relative[:, None] * torch.tensor(FACTORS, dtype=torch.float64)).flatten()
    order = edges.argsort()
    bounds = (edges[order] * float(largest)).float().to(x.device)
    counts = torch.zeros(len(edges) + 1, dtype=torch.float64, device=x.device)
    for chunk in x.split(_CHUNK):
        places = torch.bucketize(chunk.float(), bounds, out_int32=True)
        counts += torch.bincount(places, minlength=len(counts))
    under = torch.empty_like(edges)
    under[order] = counts.cumsum(0)[:-1].cpu() / x.numel()
    return under.unflatten(0, (2, -1))


def run_inputs(model: Any, inputs: Any, says: Callable[[str], None], on_step: OnStep) -> None:
    """Runs a model on inputs: a callable that runs it, or forward inputs, each a dict, a tuple or one argument.

    One dict is one input.

    Raises ValueError for none.
    """
    if callable(inputs):
        says("the calibration callable")
        inputs()
        return
    inputs = [inputs] if isinstance(inputs, Mapping) else list(inputs)
    _check_some(inputs, "inputs")
    for number, given in enumerate(inputs):
        if isinstance(given, str):
            raise ValueError(
                "a model alone takes no prompts: give its pipeline, or forward inputs of the model"
            )
        says(f"calibration input {number + 1}")
        if isinstance(given, Mapping):
            model(**given)
        elif isinstance(given, tuple | list):
            model(*given)
        else:
            model(given)
        on_step("calibrating linear layers", number + 1, len(inputs))


def run_prompts(
    pipe: Any, prompts: Iterable[str], call: Mapping[str, Any], says: Callable[[str], None], on_step: OnStep
) -> None:
    """Draws each prompt down to its latents, with its number as seed. Raises ValueError for none."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    _check_some(prompts, "prompts")
    given = {"num_inference_steps": STEPS, "output_type": "latent"} | dict(call)
    with _without_bar(pipe):
        for number, prompt in enumerate(prompts):
            says(f"prompt {prompt!r}")
            try:
                pipe(prompt=prompt, generator=torch.Generator("cpu").manual_seed(number), **given)
            except TypeError as error:
                raise ValueError(
                    f"{type(pipe).__name__} can't be called for calibration ({first_line(error)}): give call=…, its "
                    "further arguments, or as calibration a function that runs it"
                ) from error
            on_step("calibrating linear layers", number + 1, len(prompts))


@contextmanager
def _without_bar(pipe: Any) -> Iterator[None]:
    """Hides the bar that a pipeline shows for each prompt."""
    shown = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(**shown | {"disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**shown)


def _check_some(found: list[Any], what: str) -> None:
    if not found:
        raise ValueError(f"calibration has no {what}: give a few {what} like those to be drawn")
