"""The plan of a call: a policy on a layout, as the kernels take it."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from dma_diffusers.kernels.device.memory import kept
from dma_diffusers.kernels.precision import Precision, Precisions
from dma_diffusers.kernels.routing.reference import Routing
from dma_diffusers.kernels.tiling.fine_mask import FineMask, fine_mask, hide_empty_slots
from dma_diffusers.kernels.tiling.layout import Layout, tiles_with
from dma_diffusers.kernels.tiling.policies import By, Policy
from dma_diffusers.kernels.tiling.precision_map import (
    UNVISITED,
    Class,
    Phase,
    PrecisionMap,
    map_of,
    visiting_phases,
)
from dma_diffusers.kernels.tiling.tile_order import TileOrder, reached


@dataclass(frozen=True)
class Plan:
    """Everything that a call needs beside its tensors.

    precision_map: the classes of tiles, which are tiles of slots where there is a token order.
    routing: what content decides of the map; None for nothing. The map's block lists are then not looked at.
    token_order: int32 `[slots]`, the token that stands at each slot, −1 where none does; None for tokens as they are.
    fine_mask: says which slots see each other in MASKED tiles; None where the keys' length and causality say it.
    skip_below: a tile is left out where each of its probabilities is less than this share of its row's largest so
        far, 0 < skip_below < 1; None for no such tile.
    masks_all: whether a key mask may hide keys of any tile, or of the map's MASKED ones alone.
    """

    precision_map: PrecisionMap
    routing: Routing | None = None
    token_order: torch.Tensor | None = None
    fine_mask: FineMask | None = None
    skip_below: float | None = None
    masks_all: bool = True
    _block_lists: dict[tuple[torch.device, bool | str], PrecisionMap] = field(
        default_factory=dict, repr=False, compare=False
    )

    def used(self, precisions: Precisions) -> tuple[Precision | None, Precision | None, Precision | None]:
        """The precisions of HIGH, LOW and MEAN tiles; None for a class that the map doesn't have."""
        precision_map = self.precision_map
        of_means = precisions.of_means(precision_map.has_low) if precision_map.has_mean else None
        return *precision_map.used(*precisions), of_means

    def to(self, device: torch.device) -> "Plan":
        """The same plan on `device`."""
        moved = {name: value.to(device) for name, value in vars(self).items() if hasattr(value, "to")}
        return replace(self, **moved, _block_lists={})

    def block_lists(self, device: torch.device, is_shared: bool) -> PrecisionMap:
        """The map's block lists on `device`, or its `shared` ones; made once for the kernel that reads them.

        Raises ValueError where they would have to be made while a CUDA graph is captured.
        """
        return self._kept(
            device, is_shared, lambda: self.precision_map.shared if is_shared else self.precision_map
        )

    def transposed(self, lists: PrecisionMap, k_tiles: int) -> PrecisionMap:
        """The lists of a call as those of Q tiles, one for each of `k_tiles` KV tiles; made once if nothing is routed.

        lists: the map's, on the call's device, or what the call has routed. Raises ValueError as `block_lists` does.
        """
        if self.routing is not None:
            return lists.transposed(k_tiles)
        return self._kept(lists.indices.device, "transposed", lambda: self.precision_map.transposed(k_tiles))

    def _kept(self, device: torch.device, kind: bool | str, make: Callable[[], PrecisionMap]) -> PrecisionMap:
        key = (device, kind)
        if key not in self._block_lists:
            if is_capturing(device):
                raise ValueError("call attention once with these lengths before capturing it in a CUDA graph")
            lists = make()
            self._block_lists[key] = kept(lambda: lists.to(device), device)
        return self._block_lists[key]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All tensors on the device that kernels read of it."""
        lists = [x for made in self._block_lists.values() for x in (made.indices, made.bounds, made.means)]
        others = (
            *(self.routing.tensors if self.routing else ()),
            self.token_order,
            self.fine_mask.packed if self.fine_mask else None,
        )
        return [x for x in (*lists, *others) if x is not None]


def is_capturing(device: torch.device) -> bool:
    """Says whether a CUDA graph is captured on the current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def make(policy: Policy, layout: Layout, is_causal: bool = False, masks_text: bool = False) -> Plan:
    """The plan for a call with this layout of tokens.

    masks_text: tiles with text are MASKED, for a mask over keys that hides none but these.
    Raises ValueError for a policy on the grid without a grid, or with a grid that it can't have, or a causal call.
    """
    if not policy.on_grid:
        cut = tiles_with(layout.is_text) if masks_text else None
        classes = policy.classes(layout, is_causal)
        phases = visiting_phases(classes, layout, is_causal, cut=cut)
        made = _block_lists(classes, phases, policy)
        return Plan(*made, skip_below=policy.skip_below, masks_all=not masks_text)
    if not layout.grid:
        raise ValueError(f"{policy} needs the grid that the tokens lie on, and none was given")
    if is_causal:
        raise ValueError(f"{policy} can't be had with a causal mask, which compares tokens one by one")
    axes = policy.axes(layout.grid)
    tile_order = TileOrder(layout, policy.box(layout.grid))
    token_order, cut = tile_order.token_order, ~reached(axes, tile_order, "filled")
    classes = policy.classes(tile_order.layout, tile_order=tile_order)
    phases = visiting_phases(classes, tile_order.layout, token_order=token_order, cut=cut)
    packed = None
    if (phases == Phase.MASKED).any():
        packed = (
            fine_mask(token_order, tile_order.coordinates, axes) if axes else hide_empty_slots(token_order)
        )
    if masks_text:
        has_text = tiles_with(tile_order.layout.is_text)
        phases = torch.where(has_text & (phases < Phase.MEAN), int(Phase.MASKED), phases)
    made = _block_lists(classes, phases, policy)
    return Plan(*made, token_order, packed, policy.skip_below, not masks_text)


def _block_lists(
    classes: torch.Tensor, phases: torch.Tensor, policy: Policy
) -> tuple[PrecisionMap, Routing | None]:
    """A map, and what of it is routed; where the rest is not LOW, the map has taken no pair more precisely yet."""
    router = policy.router
    if router and (phases == Phase.LOW).any():
        by_rows = router.by is not By.POOLS
        if router.beyond is None:
            return map_of(phases, has_high=True), Routing.of(phases, router.budget, by_rows=by_rows)
        rest = int(Phase.MEAN) if router.beyond is Class.MEAN else UNVISITED
        routing = Routing.of(phases, router.budget, router.low or 0.0, rest, by_rows)
        beyond = map_of(torch.where(phases == Phase.LOW, rest, phases), has_high=True)
        return replace(beyond, has_low=router.low is not None), routing
    has_high = bool(((classes == Class.HIGH) & (phases < Phase.MEAN)).any())
    return map_of(phases, has_high), None
