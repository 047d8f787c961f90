"""Load a text-to-image pipeline, and the call arguments that its folder recommends."""

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline

DEMO_MODEL = Path(__file__).parent / "demo" / "flux"


def load_pipeline(model: str | Path = DEMO_MODEL) -> DiffusionPipeline:
    """The pipeline of a local folder or hub id, on the GPU in bfloat16, or on the CPU in float32.

    Only safetensors are read, and no code that comes with a model is run. Raises ValueError where `model` is
    no text-to-image pipeline, OSError where it cannot be read or fetched.
    """
    _check_folder(model)
    class_name = DiffusionPipeline.load_config(model).get("_class_name")
    if not isinstance(class_name, str) or not hasattr(diffusers, class_name):
        raise ValueError(f"{model} is a {class_name!r} pipeline, which this Diffusers does not have")
    arguments = inspect.signature(getattr(diffusers, class_name).__call__).parameters
    if not {"prompt", "height", "callback_on_step_end"} <= set(arguments) or "num_frames" in arguments:
        raise ValueError(f"{model} is a {class_name}, which does not turn text into an image")

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=dtype, use_safetensors=True).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def recommended_call(model: str | Path = DEMO_MODEL) -> dict[str, Any]:
    """Keyword arguments of the pipeline's call: `generation.json` in the model's folder, if it is there."""
    path = Path(model) / "generation.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _check_folder(model: str | Path) -> None:
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise ValueError(f"{model} is no Diffusers pipeline: the folder has no model_index.json")
    elif folder.exists() or folder.is_absolute() or str(model).count("/") != 1 or str(model).startswith("."):
        raise ValueError(f"{model} is neither a folder nor a hub id (owner/name)")
