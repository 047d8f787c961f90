"""Where a pipeline's weights are while it draws, and whether its VAE works in tiles: what fits the GPU's memory."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline

# Bytes of what a call takes beside weights, over what was measured: of transformers 120 a pixel of all frames; of
# VAEs that decode without tiles 4,230 a pixel of one frame (QwenImage's), 60,300 where they decode clips, of any
# number of frames (HunyuanVideo 1.5's; they go through time in parts).
_TRANSFORMER, _PICTURE_DECODER, _CLIP_DECODER = 256, 5_000, 64_000
_LEAST = 2**30  # of either, and what tiles take


class Placement(NamedTuple):
    """offload: "none", all weights are on the GPU; "model", those of one component at a time; "group", those of one
    layer at a time. tiling: whether the VAE decodes in tiles."""

    offload: str
    tiling: bool


def choose(weights: Mapping[str, int], free: int, area: int, frames: int) -> Placement:
    """The fastest placement that should fit; the last one, where none does.

    Args:
        weights: bytes of each component.
        free: bytes of the GPU's memory.
        area, frames: height × width, and how many of them a call draws.
    """
    rest = [name for name in weights if name != "vae"]
    resident = {
        "none": sum(weights.values()),
        "model": max(weights.values(), default=0),
        "group": weights.get("vae", 0) + max((weights[name] for name in rest), default=0) // 20,
    }
    drawing = max(_LEAST, _TRANSFORMER * area * frames)
    decoding = min(_PICTURE_DECODER * frames, _CLIP_DECODER) * area
    for offload, held in resident.items():
        if held + max(drawing, decoding) <= free:
            return Placement(offload, tiling=False)
        if held + drawing <= free:
            return Placement(offload, tiling=True)
    return Placement("group", tiling=True)


def place(pipe: DiffusionPipeline, area: int, frames: int) -> str:
    """Put a pipeline that is on the CPU where it fits, a CUDA GPU if there is one, and say so in one line.

    area, frames: height × width, and how many of them a call draws.
    """
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    weights = {name: _bytes(module) for name, module in modules.items()}
    dtypes = _dtypes(modules)
    total = sum(weights.values())
    amount = f"{total / 1e9:.1f} GB" if total > 1e9 else f"{total / 1e6:.1f} MB"
    size = f"{type(pipe).__name__}, {amount} of weights in {dtypes}"
    if not torch.cuda.is_available():
        return f"{size}, on the CPU"
    device = torch.device("cuda", torch.cuda.current_device())
    chosen = choose(weights, torch.cuda.mem_get_info(device)[0], area, frames)
    vae = modules.get("vae")
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
