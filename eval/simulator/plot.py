"""This module draws a neighbourhood's map as a picture: which KV tiles each Q tile visits."""

import io
from pathlib import Path

import torch
import torch.nn.functional as F

from dma_diffusers.eval.simulator.count import Count
from dma_diffusers.kernels.tiling.neighborhood import shape_text, tile_map

_LARGEST = 2**25  # a map has at most so many pairs of tiles
_SKIPPED, _CUT, _FILLED, _TEXT = range(4)
_COLOURS = ("#f2f2f2", "#f29e4c", "#4477aa", "#b5b5b5")
_NAMES = ("skipped", "visited, cut by the window", "visited", "text")


def check_plot(path: Path, count: Count) -> None:
    """Raise ValueError unless `path` ends in .svg or .png and the map is small enough to draw."""
    if path.suffix not in (".svg", ".png"):
        raise ValueError(f"plots are SVG or PNG: name a file that ends in .svg or .png, not {path.name}")
    q_tiles, kv_tiles = count.grid_tiles
    if q_tiles * kv_tiles > _LARGEST:
        raise ValueError(f"a map of {q_tiles} × {kv_tiles} tiles is too large to draw: plot a smaller grid")


def classes(count: Count) -> torch.Tensor:
    """Return the class of each pair of tiles, numbers of `_NAMES`, text last: uint8 `[q_tiles, kv_tiles]`."""
    sides = list(zip(count.axes, count.q_tile, count.kv_tile, strict=True))
    kv_tiles = [axis.tiles(kv_side) for axis, _, kv_side in sides]
    visited = tile_map([axis.visited(q_side, kv_side) for axis, q_side, kv_side in sides], kv_tiles)
    filled = tile_map([axis.filled(q_side, kv_side) for axis, q_side, kv_side in sides], kv_tiles)
    of_grid = torch.where(filled, _FILLED, torch.where(visited, _CUT, _SKIPPED)).to(torch.uint8)
    q_text, kv_text = count.text_tiles
    return F.pad(of_grid, (0, kv_text, 0, q_text), value=_TEXT)


def plot(count: Count, kind: str) -> bytes:
    """Draw the map of `count`, with its boxes in row-major order, as a file of `kind` svg or png; needs matplotlib."""
    import matplotlib
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    drawn = classes(count)
    colours = (torch.tensor([to_rgb(colour) for colour in _COLOURS]) * 255).round().to(torch.uint8)
    with matplotlib.rc_context({"svg.hashsalt": "map", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(7, 6.4), layout="constrained")
        axes = figure.add_subplot()
        axes.imshow(colours[drawn.long()].numpy(), aspect="auto")
        axes.set(xlabel="KV tile", ylabel="Q tile", title=_title(count))
        patches = [Patch(color=_COLOURS[kind], label=_NAMES[kind]) for kind in drawn.unique().tolist()]
        figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False)
        file = io.BytesIO()
        figure.savefig(file, format=kind, dpi=160, metadata={"Date": None} if kind == "svg" else None)
    return file.getvalue()


def _title(count: Count) -> str:
    grid, window, stride = (
        shape_text([getattr(axis, name) for axis in count.axes]) for name in ("length", "window", "stride")
    )
    boxes = f"Q tiles {shape_text(count.q_tile)}, KV tiles {shape_text(count.kv_tile)}"
    return f"grid {grid}, window {window}, stride {stride}\n{boxes}: {count.speedup_worst:.2f}× fewer tiles"
