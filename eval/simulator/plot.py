"""This module draws maps as pictures: how each Q tile takes each KV tile, of a neighbourhood or of any policy."""

import io
from pathlib import Path

import torch
import torch.nn.functional as F

from dma_diffusers.eval.classes import tile_classes
from dma_diffusers.eval.simulator.count import Count
from dma_diffusers.kernels import plan
from dma_diffusers.kernels.tiling.layout import Layout
from dma_diffusers.kernels.tiling.neighborhood import shape_text, tile_map
from dma_diffusers.kernels.tiling.policies import Policy
from dma_diffusers.kernels.tiling.precision_map import Class, Phase

_LARGEST = 2**25  # a map has at most so many pairs of tiles
_SKIPPED, _CUT, _FILLED, _TEXT = range(4)
_KINDS = (
    ("skipped", "#f2f2f2"),
    ("visited, cut by the window", "#f29e4c"),
    ("visited", "#4477aa"),
    ("text", "#b5b5b5"),
)
_BY_CONTENT = len(Class)
_CLASSES = (
    ("HIGH", "#1f3d66"),
    ("LOW", "#6ea3d0"),
    ("MEAN", "#f2c879"),
    ("SKIP", "#f2f2f2"),
    ("chosen by content", "#b07aa1"),
)


def check_plot(path: Path, q_tiles: int, kv_tiles: int) -> None:
    """Raise ValueError unless `path` ends in .svg or .png and the map is small enough to draw."""
    if path.suffix not in (".svg", ".png"):
        raise ValueError(f"plots are SVG or PNG: name a file that ends in .svg or .png, not {path.name}")
    if q_tiles * kv_tiles > _LARGEST:
        raise ValueError(f"a map of {q_tiles} × {kv_tiles} tiles is too large to draw: plot a smaller grid")


def classes(count: Count) -> torch.Tensor:
    """Return the class of each pair of tiles, numbers of `_KINDS`, text last: uint8 `[q_tiles, kv_tiles]`."""
    sides = list(zip(count.axes, count.q_tile, count.kv_tile, strict=True))
    kv_tiles = [axis.tiles(kv_side) for axis, _, kv_side in sides]
    visited = tile_map([axis.visited(q_side, kv_side) for axis, q_side, kv_side in sides], kv_tiles)
    filled = tile_map([axis.filled(q_side, kv_side) for axis, q_side, kv_side in sides], kv_tiles)
    of_grid = torch.where(filled, _FILLED, torch.where(visited, _CUT, _SKIPPED)).to(torch.uint8)
    q_text, kv_text = count.text_tiles
    return F.pad(of_grid, (0, kv_text, 0, q_text), value=_TEXT)


def classes_of(policy: Policy, layout: Layout) -> torch.Tensor:
    """Return the class of each pair in a policy's first head, numbers of `_CLASSES`: uint8 `[q_tiles, k_tiles]`."""
    made = plan.make(policy, layout)
    drawn = tile_classes(made)[0, 0]
    if made.routing is not None:
        drawn = torch.where(made.routing.phases[0, 0] == Phase.LOW, _BY_CONTENT, drawn)
    return drawn.to(torch.uint8)


def plot(count: Count, kind: str) -> bytes:
    """Draw the map of `count`, with its boxes in row-major order, as a file of `kind` svg or png; needs matplotlib."""
    return _draw(classes(count), _KINDS, _title(count), kind)


def plot_policy(policy: Policy, layout: Layout, kind: str) -> bytes:
    """Draw the map of a policy's first head, tiles in the kernel's order, as `plot` does."""
    where = f"grid {shape_text(layout.grid)}, {layout.text_length} text tokens"
    return _draw(classes_of(policy, layout), _CLASSES, f"{policy}\n{where}", kind)


def _draw(drawn: torch.Tensor, kinds: tuple[tuple[str, str], ...], title: str, file_kind: str) -> bytes:
    """Draw a map whose numbers are places in `kinds`, each a name and a colour."""
    import matplotlib
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    colours = (torch.tensor([to_rgb(colour) for _, colour in kinds]) * 255).round().to(torch.uint8)
    with matplotlib.rc_context({"svg.hashsalt": "map", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(7, 6.4), layout="constrained")
        axes = figure.add_subplot()
        axes.imshow(colours[drawn.long()].numpy(), aspect="auto")
        axes.set(xlabel="KV tile", ylabel="Q tile", title=title)
        shown = [kinds[number] for number in drawn.unique().tolist()]
        patches = [Patch(color=colour, label=name) for name, colour in shown]
        figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False)
        file = io.BytesIO()
        date = {"Date": None} if file_kind == "svg" else None
        figure.savefig(file, format=file_kind, dpi=160, metadata=date)
    return file.getvalue()


def _title(count: Count) -> str:
    grid, window, stride = (
        shape_text([getattr(axis, name) for axis in count.axes]) for name in ("length", "window", "stride")
    )
    boxes = f"Q tiles {shape_text(count.q_tile)}, KV tiles {shape_text(count.kv_tile)}"
    return f"grid {grid}, window {window}, stride {stride}\n{boxes}: {count.speedup_worst:.2f}× fewer tiles"
