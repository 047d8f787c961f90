"""A user's own model, the folder of a pipeline or of a transformer, becomes a step that can be measured."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dma_diffusers.components import transformers_of
from dma_diffusers.eval.bench.models import INPUTS, MODELS, TEXT_TOKENS, Workload, random_inputs, without_mask
from dma_diffusers.families import known_family
from dma_diffusers.kernels.tiling.policies import Neighborhood

_PROMPT = "A red fox in the snow, a photograph"
_PIXELS = 16  # a token of the models in INPUTS stands for so many pixels on each side
_FRAMES_PER_LATENT = 4


@dataclass(frozen=True)
class Own:
    """A transformer in a user's folder; a `Workload`.

    folder: has the transformer's config.json and weights. recorded: the arguments of its forward call, as its pipeline
    made them; empty for a transformer without a pipeline, which gets random ones of `grid`. dtype: of the weights.
    """

    kind: str
    size: str
    grid: tuple[int, ...]
    folder: Path
    recorded: Mapping[str, Any]
    is_video: bool
    dtype: torch.dtype = torch.bfloat16
    neighborhood: Neighborhood | None = None

    def build(self, device: torch.device, seed: int) -> torch.nn.Module:
        """Load the model."""
        import diffusers

        kind = getattr(diffusers, self.kind)
        model = kind.from_pretrained(self.folder, torch_dtype=self.dtype, use_safetensors=True)
        model = model.to(device).eval().requires_grad_(False)
        return model if self.recorded else without_mask(model)

    def inputs(self, model: torch.nn.Module, seed: int) -> dict[str, Any]:
        """Return the arguments of the model's forward call, on its device."""
        if self.recorded:
            return {
                name: value.to(model.device) if isinstance(value, torch.Tensor) else value
                for name, value in self.recorded.items()
            }
        return random_inputs(model, TEXT_TOKENS[self.kind], self.grid, seed)


class _Recorded(Exception):
    """The first forward call of a transformer was reached, and its arguments were recorded."""


def named(name: str, size: tuple[int, ...] | None = None, frames: int | None = None) -> Workload:
    """Return the step of the model of a name, or of the one in a folder.

    size, frames: as for `own`. Raises ValueError for a name that is neither, and for a size that goes with none.
    """
    if name in MODELS:
        if size or frames:
            raise ValueError(f"{name} has its own size: --size and --frames are for folders")
        return MODELS[name]
    if not Path(name).is_dir():
        raise ValueError(
            f"unknown model {name!r}: choose from {', '.join(MODELS)}, "
            "or give the folder of a pipeline or of a transformer"
        )
    if size and len(size) != 2:
        raise ValueError(f"--size {'x'.join(map(str, size))}: give width and height, as in 1024x1024")
    return own(Path(name), size, frames)


def own(folder: Path, size: tuple[int, ...] | None, frames: int | None) -> Own:
    """Return the step that a folder's model makes, a pipeline's at the first noise level, of a prompt of ours.

    size: width and height of the picture or clip in pixels, frames: of the clip; None for what the pipeline's folder
    recommends, or its class, or, for a transformer without a pipeline, for 1024×1024 and 81. Raises ValueError where
    the folder holds no model that can be measured.
    """
    if (folder / "model_index.json").is_file():
        return _of_pipeline(folder, size, frames)
    try:
        kind = json.loads((folder / "config.json").read_text())["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder} has neither a pipeline's model_index.json nor a transformer's config.json"
        ) from error
    if kind not in INPUTS:
        raise ValueError(
            f"{folder} is a {kind}, whose inputs only its pipeline makes: give the pipeline's folder "
            f"(transformers alone are measured for {', '.join(INPUTS)})"
        )
    width, height = size or (1024, 1024)
    is_video = "Video" in kind or kind.startswith("Wan")
    if height % _PIXELS or width % _PIXELS:
        raise ValueError(f"--size {width}x{height}: give multiples of {_PIXELS}")
    grid: tuple[int, ...] = (height // _PIXELS, width // _PIXELS)
    if is_video:
        frames = frames or 81
        grid = (1 + (frames - 1) // _FRAMES_PER_LATENT, *grid)
    return Own(kind, _words(width, height, frames if is_video else None), grid, folder, {}, is_video)


def _of_pipeline(folder: Path, size: tuple[int, ...] | None, frames: int | None) -> Own:
    """Run a pipeline up to the first forward call of a transformer, and record that call's arguments."""
    from dma_diffusers.pipelines.load import ability, load_pipeline, recommended_call

    wanted = recommended_call(folder) | {"num_inference_steps": 1}
    if frames:
        wanted["num_frames"] = frames
    if size:
        wanted |= dict(zip(("width", "height"), size, strict=True))
    pipe = load_pipeline(folder, calls=[wanted])
    recorded: dict[str, Any] = {}

    def record(model: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if args:
            raise ValueError(f"{type(pipe).__name__} gives its transformer arguments without names")
        recorded.update(kwargs, _model=model)
        raise _Recorded

    models = transformers_of(pipe)
    hooks = [model.register_forward_pre_hook(record, with_kwargs=True) for _, model in models]
    try:
        pipe(prompt=_PROMPT, **wanted)
    except _Recorded:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    model = recorded.pop("_model")
    recorded.pop("return_dict", None)
    (prefix,) = (prefix for prefix, each in models if each is model)
    sides = [wanted.get(name) for name in ("width", "height")]
    words = _words(*sides, wanted.get("num_frames")) if all(sides) else "the pipeline's own size"
    is_video = ability(type(pipe)).video
    kind = type(model).__name__
    grid = _grid(model, recorded)
    return Own(kind, words, grid, folder / prefix.rstrip("."), recorded, is_video, model.dtype)


def _grid(model: torch.nn.Module, call: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the grid that a call's tokens lie on; () where it isn't known."""
    family = known_family(model)
    if family is None or family.grid is None:
        return ()
    try:
        return tuple(family.grid(model, call))
    except ValueError:
        return ()


def _words(width: int, height: int, frames: int | None) -> str:
    return f"{width}×{height}" + (f", {frames} frames" if frames else "")
