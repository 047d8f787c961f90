"""The plan of a call: a policy on a layout, as the kernels take it."""

from dataclasses import dataclass, replace

import torch

from dma_diffusers.kernels.layout import Layout
from dma_diffusers.kernels.maps import TILE, Class, PrecisionMap, build_map, cut_tiles, tiles
from dma_diffusers.kernels.places import Places
from dma_diffusers.kernels.policies import Policy, reached
from dma_diffusers.kernels.spans import Spans, spans


@dataclass(frozen=True)
class Plan:
    """What a call needs beside its tensors.

    precision_map: of places, where there is an order. order: int32 `[places]`, the token that stands at each, −1 where
    none does; None for tokens as they are. spans: who sees whom in MASKED tiles; None where that is a matter of the
    keys' length and causality. skip_below: as a policy's.
    """

    precision_map: PrecisionMap
    order: torch.Tensor | None = None
    spans: Spans | None = None
    skip_below: float = 0.0

    def to(self, device: torch.device) -> "Plan":
        """The same plan on `device`."""
        return replace(
            self,
            precision_map=self.precision_map.to(device),
            order=None if self.order is None else self.order.to(device),
            spans=None if self.spans is None else self.spans.to(device),
        )


def make(policy: Policy, layout: Layout, is_causal: bool = False, masks_text: bool = False) -> Plan:
    """The plan for a call with this layout of tokens.

    masks_text: tiles with text are MASKED, for a mask over keys that hides none but these.
    Raises ValueError for a policy on the grid without a grid, or with a grid that it can't have, or a causal call.
    """
    if not policy.on_grid:
        classes = policy.classes(layout, is_causal)
        cut = _with_text(layout) if masks_text else None
        return Plan(build_map(classes, layout, is_causal, cut=cut), skip_below=policy.skip_below)
    if not layout.grid:
        raise ValueError(f"{policy} needs the grid that the tokens lie on, and none was given")
    if is_causal:
        raise ValueError(f"{policy} can't be had with a causal mask, which compares tokens one by one")
    axes = policy.axes(layout.grid)
    places = Places(layout, policy.box(layout.grid))
    order, cut = places.order, ~reached(axes, places, "filled")
    classes = policy.classes(places.layout, places=places)
    is_visited = (classes != Class.SKIP).any(1)[0]
    has_spans = bool((is_visited & (cut | cut_tiles(places.layout, False, order))).any())
    cut = cut | _with_text(places.layout) if masks_text else cut
    precision_map = build_map(classes, places.layout, order=order, cut=cut)
    packed = spans(order, places.coordinates, axes) if has_spans else None
    return Plan(precision_map, order, packed, policy.skip_below)


def _with_text(layout: Layout) -> torch.Tensor:
    """Which KV tiles hold text: bool `[1, k_tiles]`."""
    start, stop = layout.text
    tile = torch.arange(tiles(layout.k_length))[None]
    return (tile >= start // TILE) & (tile < tiles(stop)) & (stop > start)
