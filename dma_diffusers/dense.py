"""The steps and attention modules that run with every tile HIGH: those asked for, or the family's."""

from typing import NamedTuple

from dma_diffusers.config import DMAConfig
from dma_diffusers.families import Family


class DenseParts(NamedTuple):
    """above_sigma: steps with a higher noise level are dense; None for no such step. modules: names.

    note: whose choice it is where it is not the user's, or that none is known; else empty.
    """

    above_sigma: float | None
    modules: frozenset[str]
    note: str


def dense_parts(config: DMAConfig, family: Family, kind: str, modules: tuple[str, ...]) -> DenseParts:
    """The parts of a model of this family that `config` makes dense.

    kind: name of its class. modules: its attention modules that can be intercepted, in module order. Where a schedule
    was given, it says which steps are dense, and none are by default.
    Raises ValueError for `dense_layers` that it has not, and for `quality_first` where nothing is known of its family.
    """
    sigma, layers, note = config.dense_above_sigma, config.dense_layers, ""
    count, dense = len(modules), frozenset(filter(config.is_dense, modules))
    if not all(-count <= index < count for index in layers or ()):
        raise ValueError(f"dense_layers {layers}: {kind} has {count} modules to intercept")
    own = {name: config.of_module(name) for name in modules if name not in dense}
    leaving_out = {name for name, of in own.items() if any(e.config.asked.leaves_out for e in of.entries)}
    if sigma is None and leaving_out and all(own[name].schedule is not None for name in leaving_out):
        sigma = 1
    if leaving_out and None in (sigma, layers):
        found = family.quality_first if config.quality_first else family.dense_first
        if found:
            parts = ["steps"] * (sigma is None) + ["layers"] * (layers is None and bool(found.layers))
            why = "for quality first" if config.quality_first else "by default"
            note = f"dense {' and '.join(parts)} {why}: {found.source}" if parts else ""
            sigma = found.above_sigma if sigma is None else sigma
            if layers is None:
                there = (index for index in found.layers if -count <= index < count)
                layers = tuple(index for index in there if modules[index] in leaving_out)
        elif config.quality_first:
            raise ValueError(
                f"quality_first: no dense steps or layers are known for {kind}: "
                "give dense_above_sigma and dense_layers"
            )
        else:
            note = f"no dense steps or layers by default: none are known for {kind}"
    chosen = dense.union(modules[index] for index in layers or ())
    return DenseParts(sigma if sigma is not None and sigma < 1 else None, chosen, note)
