"""The plan of each linear layer: its groups, the order of its channels, its input scale."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dma_diffusers.kernels.formats import E4M3
from dma_diffusers.kernels.linears.groups import Groups
from dma_diffusers.linears.allocation import factor_for, groups_of, permutation_of
from dma_diffusers.linears.calibration import Calibration
from dma_diffusers.linears.exclusions import Choice
from dma_diffusers.linears.methods import KEEPS_EIGHT

HEADROOM = 4.0
"""Fixed input scales of fp8 leave so much room over the largest |x| of calibration. As e4m3 is a float, that costs
nothing but the smallest numbers."""
_KEPT = "mxfp8"
# Where calibration has not seen who reads what: layers that read the same tensor, by the ends of their names, in the
# order of their calls.
_READ_TOGETHER = (
    ("to_q", "to_k", "to_v"),
    ("add_q_proj", "add_k_proj", "add_v_proj"),
    ("to_query", "to_key", "to_value"),
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("proj_mlp", "attn.to_q", "attn.to_k", "attn.to_v"),
)


@dataclass
class Plan:
    """The way in which one layer is to be quantised.

    shared: the name under which layers with the same input go; empty if only a call will tell.
    keeps: whether another layer is to read the same tensor next.
    """

    groups: Groups
    permutation: torch.Tensor | None = None
    input_scale: float | None = None
    shared: str = ""
    keeps: bool = False


@dataclass
class Target:
    """A transformer that is to be quantised.

    prefix: of its module names in a pipeline. seen: what calibration saw of it; None if that is not asked for.
    plans, over_time: what `make_plans` found: by the name of the layer, and `Calibration.over_time`.
    """

    prefix: str
    model: torch.nn.Module
    choice: Choice
    seen: Calibration | None = None
    plans: dict[str, Plan] = field(default_factory=dict)
    over_time: dict[str, Any] | None = None


def make_plans(targets: Sequence[Target], method: str, bits: float | None, own: Mapping[str, Groups]) -> None:
    """Plans every layer; those that calibration should have seen and did not are left alone.

    own: groups that single layers are given, by name, with or without the prefix.
    Raises ValueError where `bits` can't be had, or `own` names no layer, or groups do not fit one.
    """
    for target in targets:
        if method == "micromix" and target.seen:
            for name in target.choice.layers.keys() - target.seen.readers.keys() - own.keys():
                target.choice.left[name] = "calibration never ran it"
                del target.choice.layers[name]
    layers = {target.prefix + name: (target, name) for target in targets for name in target.choice.layers}
    if absent := own.keys() - layers.keys() - {name for _, name in layers.values()}:
        raise ValueError(f"groups: there is no layer {min(absent)} to quantise")

    def groups_at(layer: str, factor: float) -> Groups:
        target, name = layers[layer]
        width = target.choice.layers[name].in_features
        given = own.get(layer, own.get(name))
        if given and given.in_features != width:
            raise ValueError(f"groups: {name} has {width} channels, not {given.in_features}")
        if given:
            return given
        if name in target.choice.kept and method in KEEPS_EIGHT:
            return Groups.whole(_KEPT, width)
        if method != "micromix" or target.seen is None:
            return Groups.whole(method, width)
        return groups_of(width, target.seen.statistics(name).shares().at(factor))

    factor = 1.0
    if bits is not None:
        weights = {
            layer: target.choice.layers[name].weight.numel() for layer, (target, name) in layers.items()
        }
        factor = factor_for(bits, weights, groups_at)
    for target in targets:
        target.plans = {
            name: _plan(groups_at(target.prefix + name, factor), name, target)
            for name in target.choice.layers
        }
        if target.seen and method == "micromix":
            target.over_time = target.seen.over_time(factor)


def _plan(groups: Groups, name: str, target: Target) -> Plan:
    """The plan of a layer with these groups: channels are sorted where formats differ, fp8 gets its fixed scale."""
    seen, layers = target.seen, target.choice.layers
    if seen is None or name not in seen.readers:
        return Plan(groups, keeps=_is_read_again(name, layers))
    shared, keeps = seen.shared(name), seen.is_read_again(name, layers)
    if len(groups.formats) > 1:
        return Plan(groups, permutation_of(seen.statistics(name).mean_abs), None, shared, keeps)
    if groups.formats == ("fp8",):
        return Plan(groups, None, input_scale_of(seen.statistics(name).amax), shared, keeps)
    return Plan(groups, keeps=keeps)


def _is_read_again(name: str, layers: Collection[str]) -> bool:
    """Tells by the names whether another one of these layers reads the same tensor after this one."""
    for together in _READ_TOGETHER:
        for place, own in enumerate(together):
            if name.endswith(f".{own}"):
                parent = name.removesuffix(own)
                if any(parent + later in layers for later in together[place + 1 :]):
                    return True
    return False


def input_scale_of(amax: float) -> float:
    """The fixed scale of an input whose largest |x| is `amax`: a power of two that leaves `HEADROOM` in e4m3."""
    return 2.0 ** math.ceil(math.log2(max(amax, 2.0**-100) * HEADROOM / E4M3.max))
