"""Where a pipeline's weights are while it draws, and whether its VAE works in tiles: what fits the GPU's memory."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline

# Bytes of what a call takes beside weights, above all that was measured (eval/results/h200_placement.txt).
# Transformers: for each pixel of all frames. The least of a call, and what VAEs take that decode in tiles.
_DRAWS, _LEAST = {"picture": 512, "clip": 256}, {"picture": 2**30, "clip": 2**32}
# VAEs without tiles: for each pixel of one frame; of clips, which they decode in parts, for any number of frames.
_DECODES_FRAME, _DECODES_CLIP = 5_000, 64_000


class Size(NamedTuple):
    """What a call draws: height × width in pixels, and how many frames."""

    area: int
    frames: int


class Placement(NamedTuple):
    """offload: "none", all weights are on the GPU; "model", those of one component at a time; "group", those of one
    layer at a time. tiling: whether the VAE decodes in tiles."""

    offload: str
    tiling: bool


def choose(weights: Mapping[str, int], free: int, sizes: Sequence[Size]) -> Placement:
    """The fastest placement that should fit; the last one, where none does.

    Args:
        weights: bytes of each component.
        free: bytes of the GPU's memory.
        sizes: what calls draw.
    """
    rest = [name for name in weights if name != "vae"]
    resident = {
        "none": sum(weights.values()),
        "model": max(weights.values(), default=0),
        "group": weights.get("vae", 0) + max((weights[name] for name in rest), default=0) // 20,
    }
    drawing, decoding = max(map(_drawing, sizes)), max(map(_decoding, sizes))
    for offload, held in resident.items():
        if held + max(drawing, decoding) <= free:
            return Placement(offload, tiling=False)
        if held + drawing <= free:
            return Placement(offload, tiling=True)
    return Placement("group", tiling=True)


def own_device() -> torch.device:
    """Where pipelines run: the current CUDA GPU of this process, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def place(pipe: DiffusionPipeline, sizes: Sequence[Size]) -> str:
    """Put a pipeline that is on the CPU where it fits, a CUDA GPU if there is one, and say so in one line.

    sizes: what calls draw.
    """
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    weights = {name: _bytes(module) for name, module in modules.items()}
    dtypes = _dtypes(modules)
    total = sum(weights.values())
    amount = f"{total / 1e9:.1f} GB" if total > 1e9 else f"{total / 1e6:.1f} MB"
    size = f"{type(pipe).__name__}, {amount} of weights in {dtypes}"
    device = own_device()
    if device.type == "cpu":
        return f"{size}, on the CPU"
    chosen = choose(weights, torch.cuda.mem_get_info(device)[0], sizes)
    vae: Any = modules.get("vae")
    tiling = chosen.tiling and hasattr(vae, "enable_tiling")
    if tiling:
        vae.enable_tiling()
    if chosen.offload == "none":
        pipe.to(device)
    elif chosen.offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    else:
        # Tiles are of several sizes, which streamed layers do not expect: the VAE, which is small, stays.
        pipe.enable_group_offload(device, offload_type="leaf_level", use_stream=True, exclude_modules="vae")
        if vae is not None:
            vae.to(device)
    where = {"none": "all", "model": "one component at a time", "group": "one layer at a time"}[
        chosen.offload
    ]
    return f"{size}, {where} on {torch.cuda.get_device_name(device)}{', VAE in tiles' if tiling else ''}"


def _drawing(size: Size) -> int:
    kind = "picture" if size.frames == 1 else "clip"
    return max(_LEAST[kind], _DRAWS[kind] * size.area * size.frames)


def _decoding(size: Size) -> int:
    return size.area * min(_DECODES_FRAME * size.frames, _DECODES_CLIP)


def _bytes(module: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def _dtypes(modules: Mapping[str, torch.nn.Module]) -> str:
    """The dtype of most, and who has another."""
    of = {
        name: str(module.dtype).removeprefix("torch.")
        for name, module in modules.items()
        if hasattr(module, "dtype")
    }
    most = max(of.values(), key=list(of.values()).count)
    others = [f"{name} in {dtype}" for name, dtype in of.items() if dtype != most]
    return f"{most} ({', '.join(others)})" if others else most
