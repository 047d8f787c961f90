"""This module measures what configurations lose on recorded attention calls, and how much attention they keep HIGH."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from dma_diffusers.config import DMAConfig
from dma_diffusers.eval.classes import tile_classes
from dma_diffusers.eval.recordings.exact import exact_attention, in_slots
from dma_diffusers.eval.recordings.store import Recording, Recordings, Tensors
from dma_diffusers.families import FAMILIES, Family
from dma_diffusers.kernels import operator, plan
from dma_diffusers.kernels.tiling.layout import Layout
from dma_diffusers.kernels.tiling.policies import Dense, Policy, parse
from dma_diffusers.kernels.tiling.precision_map import Class
from dma_diffusers.stages import stages


@dataclass(frozen=True)
class Measured:
    """These are sums of one configuration over batch entries, tokens and the transformer's calls in a step.

    Each is float64 `[prompts, modules, steps, heads]`, NaN where nothing was recorded. error, exact, out: squared norms
    of the error, of exact attention, and of the configuration's. product: out · exact. recall: the share of exact
    attention's probability that lies in HIGH tiles, which are in tile order for a policy on the grid; in a map that
    skips none, the rest lies in LOW ones. Tiles that a policy chooses by content are not counted.
    """

    error: np.ndarray
    exact: np.ndarray
    out: np.ndarray
    product: np.ndarray
    recall: np.ndarray

    @property
    def relative_l2(self) -> np.ndarray:
        """Return ‖out − exact‖ / ‖exact‖, float64 `[prompts, modules, steps, heads]`."""
        return np.sqrt(self.error / self.exact)

    @property
    def cosine(self) -> np.ndarray:
        """Return out · exact / ‖out‖‖exact‖, float64 `[prompts, modules, steps, heads]`."""
        return self.product / np.sqrt(self.out * self.exact)

    @property
    def of_modules(self) -> np.ndarray:
        """Return ‖out − exact‖ / ‖exact‖ over all heads, float64 `[prompts, modules, steps]`."""
        return np.sqrt(np.nansum(self.error, -1) / _no_zero(np.nansum(self.exact, -1)))

    def of_prompts(self, chosen: np.ndarray) -> "Measured":
        """Return the sums of some of the prompts: bool `[prompts]`."""
        return Measured(*(values[chosen] for values in vars(self).values()))


def measure(
    recordings: Recordings,
    configurations: Mapping[str, DMAConfig],
    device: torch.device | str | None = None,
    on_step: Callable[[str, int, int], None] = lambda title, done, total: None,
) -> dict[str, Measured]:
    """Compare every configuration's attention of every recording with exact attention of the same q, k, v in float64.

    A configuration runs as it would in the pipeline: with its modules' own fields, dense layers and dense steps, and
    with stock attention, in the recording's dtype, where it leaves a call to that; a stock call's recall is 1. Alone
    `importance` finds its pairs anew in each recording, where a drawing remembers them for some steps. device:
    where it runs; the GPU if there is one, by default. on_step: called with a title, recordings done, and of how many.
    Raises ValueError for a damaged recording or one that is not finite, an output that is not, no recordings, or a
    lowering that cannot run on `device`.
    """
    if not len(recordings):
        raise ValueError(f"there are no recordings in {recordings.folder}")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    places = {
        name: {value: place for place, value in enumerate(values)}
        for name, values in (
            ("prompt", recordings.prompts), ("module", recordings.modules), ("step", recordings.steps)
        )
    }  # fmt: skip
    sums: dict[str, np.ndarray] = {}
    weights = np.zeros([len(place) for place in places.values()])
    for done, recording in enumerate(recordings, 1):
        tensors = Tensors(*(x if x is None else x.to(device) for x in recordings.tensors(recording)))
        place = tuple(places[name][getattr(recording, name)] for name in places)
        results = _measure_one(recordings, recording, tensors, configurations)
        weights[place] += 1
        for name, values in results.items():
            stored = sums.setdefault(name, np.zeros((5, *weights.shape, 0)))
            missing = values.shape[1] - stored.shape[-1]
            if missing > 0:  # modules may differ in their numbers of heads
                stored = sums[name] = np.concatenate(
                    [stored, np.full((*stored.shape[:-1], missing), np.nan)], -1
                )
            there = stored[(slice(None), *place, slice(values.shape[1]))]
            there[:] = values + (there if weights[place] > 1 else 0)
        on_step("measuring", done, len(recordings))
    weights = np.where(weights == 0, np.nan, weights)[..., None]
    return {name: Measured(*stored[:4], stored[4] / weights) for name, stored in sums.items()}


def to_json(recordings: Recordings, measured: Mapping[str, Measured]) -> dict[str, Any]:
    """Return relative L2, cosine and recall of each configuration, nested [prompt][module][step][head].

    null stands where there was no call.
    """
    return {
        "modules": recordings.modules,
        "steps": recordings.steps,
        "configurations": {
            name: {
                quantity: _nested(getattr(values, quantity))
                for quantity in ("relative_l2", "cosine", "recall")
            }
            for name, values in measured.items()
        },
    }


def layers(recordings: Recordings, measured: Mapping[str, Measured]) -> dict[str, Any]:
    """Return the `layers` of an evaluation: each configuration's relative L2, [module][step], a mean over prompts."""
    return {
        "prompts": len(recordings.prompts),
        "modules": recordings.modules,
        "steps": recordings.steps,
        "relative_l2": {
            name: _nested(mean_of_present(values.of_modules, 0)) for name, values in measured.items()
        },
    }


def _measure_one(
    recordings: Recordings, recording: Recording, tensors: Tensors, configurations: Mapping[str, DMAConfig]
) -> dict[str, np.ndarray]:
    """Return `Measured`'s quantities of one call for each configuration, float64 `[5, heads]`."""
    exact, mass = exact_attention(tensors, recording.scale, recording.is_causal)
    masses = {None: mass}  # its keys are tile orders
    if not exact.isfinite().all():
        raise ValueError(f"{recording.file}: attention gives NaN or infinity there, in float64")
    known: dict[str, np.ndarray] = {}
    results = {}
    for name, configuration in configurations.items():
        arguments = _arguments(recordings, recording, tensors, configuration)
        key = json.dumps(arguments)
        if key not in known:
            known[key] = _compared(recording, tensors, arguments, exact, masses)
            if not np.isfinite(known[key]).all():
                raise ValueError(f"configuration {name!r} gives NaN or infinity on {recording.file}")
        results[name] = known[key]
    return results


def _arguments(
    recordings: Recordings, recording: Recording, tensors: Tensors, config: DMAConfig
) -> dict[str, Any] | None:
    """Return the operator's keyword arguments, without those that change nothing; None for stock attention."""
    q, k, _, mask = tensors
    of_module = at_noise_of(recordings, recording, config)
    masked = "" if mask is None else _family(recordings).masked(of_module.protected(recording.text))
    of_call = q.device, q.shape[-1]
    if of_module.why_stock(*of_call, masked) or k.shape[2] < of_module.least_keys(*of_call):
        return None
    arguments = of_module.arguments(recording.text, of_module.grid or recording.grid)
    if of_module.asked == Dense(Class.HIGH):
        kept = ("high", "lowering", "rotation", "smooth_k", "smooth_v", "policy")
        return {name: arguments[name] for name in kept}
    return arguments


def at_noise_of(recordings: Recordings, recording: Recording, config: DMAConfig) -> DMAConfig:
    """Return what a configuration runs this call with: its module's own, at the noise level of its step."""
    kind, modules = recordings.settings["model"]["class"], tuple(recordings.settings["model"]["modules"])
    return stages(config, _family(recordings), kind, modules).at(recording.module, recording.sigma)


def _family(recordings: Recordings) -> Family:
    return FAMILIES.get(recordings.settings["model"]["class"], Family("none"))


def policy_and_layout(arguments: Mapping[str, Any], recording: Recording) -> tuple[Policy, Layout]:
    """Return the policy that the operator follows with these arguments, and the layout that it follows it on."""
    text = arguments.get("text_start", 0), arguments.get("text_stop", 0)
    layout = replace(recording.layout, text=text, grid=arguments.get("grid", ()))
    return parse(arguments["policy"]), layout


def _compared(
    recording: Recording,
    tensors: Tensors,
    arguments: dict[str, Any] | None,
    exact: torch.Tensor,
    masses: dict[bytes | None, torch.Tensor],
) -> np.ndarray:
    q, k, v, mask = tensors
    if arguments is None:
        key_mask = None if mask is None else mask[:, None, None]
        out = scaled_dot_product_attention(
            q, k, v, key_mask, is_causal=recording.is_causal, scale=recording.scale,
            enable_gqa=q.shape[1] != k.shape[1],
        ).nan_to_num()  # fmt: skip
        kept = masses[None].sum((-2, -1))
    else:
        out = operator.attention(q, k, v, mask, recording.scale, recording.is_causal, **arguments).out
        made = plan.make(*policy_and_layout(arguments, recording), recording.is_causal)
        token_order = made.token_order
        key = None if token_order is None else token_order.numpy().tobytes()
        if key not in masses:
            slots, token_order = in_slots(tensors, token_order), token_order.to(q.device)
            masses[key] = exact_attention(slots, recording.scale, recording.is_causal, token_order >= 0)[1]
        high = (tile_classes(made) == Class.HIGH).to(q.device)
        kept = (masses[key] * high).sum((-2, -1))
    out = out.double()
    quantities = [
        ((out - exact) ** 2).sum((0, 2, 3)), (exact**2).sum((0, 2, 3)), (out**2).sum((0, 2, 3)),
        (out * exact).sum((0, 2, 3)), kept.mean(0),
    ]  # fmt: skip
    return torch.stack(quantities).cpu().numpy()


def mean_of_present(values: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
    """Return the mean of what is there; NaN where nothing is."""
    there = ~np.isnan(values)
    return np.where(there, values, 0).sum(axis) / _no_zero(there.sum(axis).astype(float))


def _no_zero(values: np.ndarray) -> np.ndarray:
    return np.where(values == 0, np.nan, values)


def _nested(values: np.ndarray) -> list:
    return np.where(np.isfinite(values), values, None).tolist()
