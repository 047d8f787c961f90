"""A transformer's calls, as its pipeline makes them: recorded, and put together in batches.

Whatever the pipeline hands to its transformer (text, positions, guidance) is recorded as it is, so that a call can be
made again in training without the pipeline and its text encoders.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

LATENTS, NOISE = "hidden_states", "timestep"
"""The arguments of a transformer's call that have the noisy latents and the noise level."""

_POSITIONS = ("img_ids", "txt_ids")  # FLUX has one table of positions for all samples


@dataclass(frozen=True)
class Part:
    """A call's part in a drawing.

    step: a number that all calls of one step of the sampler share. weight: of the call's velocity in that of its step,
    where guidance adds several up.
    """

    step: int = 0
    weight: float = 1.0


@dataclass(frozen=True)
class Call:
    """One call of a transformer, with one sample or several.

    inputs: keyword arguments. shared: the names of tensors that hold for all samples; others have a sample in each
    entry of their first dimension. output: what the transformer returned, None where nobody asked it. sums: float32
    `[sums, samples]`, the weights with which outputs are added up before they are compared; None for each alone.
    """

    inputs: Mapping[str, Any]
    shared: frozenset[str]
    output: Tensor | None = None
    sums: Tensor | None = None

    @property
    def level(self) -> float:
        """The noise level in the transformer's own unit, of the first sample."""
        return float(self.inputs[NOISE].flatten()[0])


def joined(calls: Sequence[Call], device: torch.device) -> Call:
    """Put the samples of several calls into one, on `device`; what is no tensor must be equal in all of them."""
    first, inputs = calls[0], {}
    for name, value in first.inputs.items():
        if isinstance(value, Tensor) and name not in first.shared:
            value = torch.cat([call.inputs[name] for call in calls])
        inputs[name] = value.to(device) if isinstance(value, Tensor) else value
    outputs = [call.output for call in calls if call.output is not None]
    return Call(inputs, first.shared, torch.cat(outputs).to(device) if outputs else None)


class _FirstCall(Exception):
    """It ends a pipeline's call before its transformer computes anything."""


def first_call(
    pipe: DiffusionPipeline, model: torch.nn.Module, prompt: str | list[str], call: Mapping[str, Any]
) -> Call:
    """Return the first call that the pipeline makes of its transformer for a prompt, which computes nothing.

    The scheduler's noise levels are those of the call afterwards.
    """
    seen: list[Call] = []

    def stop(model: torch.nn.Module, args: tuple, inputs: dict[str, Any]) -> None:
        seen.append(_call(model, args, inputs, None))
        raise _FirstCall

    hook = model.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    with suppress(_FirstCall):
        try:
            pipe(prompt=prompt, generator=torch.Generator().manual_seed(0), output_type="latent", **call)
        finally:
            hook.remove()
    return seen[0]


@contextmanager
def recording(model: torch.nn.Module) -> Iterator[list[Call]]:
    """Yield a list to which every call of `model` is added, on the CPU, when it returns."""
    calls: list[Call] = []

    def ended(model: torch.nn.Module, args: tuple, inputs: dict[str, Any], output: Any) -> None:
        calls.append(_call(model, args, inputs, output[0]))

    hook = model.register_forward_hook(ended, with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()


def _call(model: torch.nn.Module, args: tuple, inputs: dict[str, Any], output: Tensor | None) -> Call:
    """Keep a call on the CPU; raises ValueError for arguments that can't be stored."""
    if args or LATENTS not in inputs or NOISE not in inputs:
        raise ValueError(
            f"{type(model).__name__} is called without {LATENTS} and {NOISE} by name: fine-tuning knows pipelines "
            "like FLUX's and Wan's"
        )
    batch, kept = len(inputs[LATENTS]), {}
    for name, value in inputs.items():
        if not (isinstance(value, Tensor) or _is_plain(value)):
            raise ValueError(
                f"{type(model).__name__} is called with {name}, a {type(value).__name__}: leave it out"
            )
        kept[name] = value.detach().cpu() if isinstance(value, Tensor) else value
    shared = frozenset(
        name
        for name, value in kept.items()
        if isinstance(value, Tensor) and (name in _POSITIONS or value.ndim == 0 or len(value) != batch)
    )
    return Call(kept, shared, None if output is None else output.detach().cpu())


def _is_plain(value: Any) -> bool:
    return value is None or value == {} or isinstance(value, bool | int | float | str)
