"""Choose where a pipeline's weights lie while it draws, and whether its VAE decodes in tiles, by the GPU's memory."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline

# The memory of a call beside its weights, in bytes. Each bound is above everything that was measured
# (eval/results/h200_placement.txt).
# A transformer needs this much for each pixel of each frame, and a call at least the minimum, which is also enough for
# a VAE that decodes in tiles.
_TRANSFORMER_BYTES = {"picture": 512, "clip": 256}
_MINIMUM_BYTES = {"picture": 2**30, "clip": 2**32}
# A VAE without tiles needs this much for each pixel of a frame. It decodes long clips in parts, so that the second
# number bounds what it needs for each pixel, whatever the number of frames.
_VAE_BYTES_PER_FRAME, _VAE_BYTES_PER_CLIP = 5_000, 64_000


class Size(NamedTuple):
    """The size of what a call draws: height × width in pixels, and the number of frames."""

    area: int
    frames: int


class Placement(NamedTuple):
    """A way to place a pipeline's weights.

    offload: "none" keeps all weights on the GPU, "model" those of one component at a time, and "group" those of one
    layer at a time. tiling: True if the VAE decodes in tiles.
    """

    offload: str
    tiling: bool


def choose(weights: Mapping[str, int], free: int, sizes: Sequence[Size]) -> Placement:
    """Return the fastest placement that should fit, or the one that needs least memory if none does.

    Args:
        weights: bytes of each component.
        free: free bytes of the GPU's memory.
        sizes: the sizes that the calls draw.
    """
    rest = [name for name in weights if name != "vae"]
    resident = {
        "none": sum(weights.values()),
        "model": max(weights.values(), default=0),
        "group": weights.get("vae", 0) + max((weights[name] for name in rest), default=0) // 20,
    }
    drawing, decoding = max(map(_transformer_bytes, sizes)), max(map(_vae_bytes, sizes))
    for offload, held in resident.items():
        if held + max(drawing, decoding) <= free:
            return Placement(offload, tiling=False)
        if held + drawing <= free:
            return Placement(offload, tiling=True)
    return Placement("group", tiling=True)


def own_device() -> torch.device:
    """Return the device on which pipelines run: the current CUDA GPU of this process, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def place(pipe: DiffusionPipeline, sizes: Sequence[Size]) -> str:
    """Move a pipeline from the CPU to the GPU as far as it fits, if there is a GPU; return one line that says so.

    sizes: the sizes that the calls draw.
    """
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    weights = {name: _weight_bytes(module) for name, module in modules.items()}
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
        # Streamed layers do not expect tiles of several sizes, so the VAE, which is small, stays on the GPU.
        pipe.enable_group_offload(device, offload_type="leaf_level", use_stream=True, exclude_modules="vae")
        if vae is not None:
            vae.to(device)
    where = {"none": "all", "model": "one component at a time", "group": "one layer at a time"}[
        chosen.offload
    ]
    return f"{size}, {where} on {torch.cuda.get_device_name(device)}{', VAE in tiles' if tiling else ''}"


def _transformer_bytes(size: Size) -> int:
    kind = "picture" if size.frames == 1 else "clip"
    return max(_MINIMUM_BYTES[kind], _TRANSFORMER_BYTES[kind] * size.area * size.frames)


def _vae_bytes(size: Size) -> int:
    return size.area * min(_VAE_BYTES_PER_FRAME * size.frames, _VAE_BYTES_PER_CLIP)


def _weight_bytes(module: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def _dtypes(modules: Mapping[str, torch.nn.Module]) -> str:
    """Describe the dtypes: the most common one, and the components that have another."""
    dtype_of = {
        name: str(module.dtype).removeprefix("torch.")
        for name, module in modules.items()
        if hasattr(module, "dtype")
    }
    most = max(dtype_of.values(), key=list(dtype_of.values()).count)
    others = [f"{name} in {dtype}" for name, dtype in dtype_of.items() if dtype != most]
    return f"{most} ({', '.join(others)})" if others else most
