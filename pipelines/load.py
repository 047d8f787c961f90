"""Load a text-to-image pipeline, and the call arguments that its folder recommends."""

import inspect
import json
from pathlib import Path
from typing import Any, get_args

import diffusers
import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError

DEMO_MODEL = Path(__file__).parent / "demo" / "flux"
VIDEO_DEMO_MODEL = Path(__file__).parent / "demo_video" / "wan"
_DEMOS = {None: DEMO_MODEL, "demo": DEMO_MODEL, "demo-video": VIDEO_DEMO_MODEL}
# Arguments of pipelines that edit or follow a picture.
_PICTURES_IN = {"strength", "mask_image", "control_image", "video"}


def named_model(name: str | None) -> str | Path:
    """The folder of an embedded model for "demo" or None and "demo-video"; anything else as it is."""
    return _DEMOS.get(name, name)


def load_pipeline(model: str | Path = DEMO_MODEL, video: bool = False) -> DiffusionPipeline:
    """The pipeline of a local folder or hub id, on the GPU in bfloat16, or on the CPU in float32.

    Only safetensors are read, and no code that comes with a model is run. Raises ValueError where `model` is
    no text-to-image pipeline (video: nor a text-to-video one), OSError where it cannot be read or fetched.
    """
    pipeline = _pipeline_class(model)
    if not draws_from_text_alone(pipeline, video):
        raise ValueError(f"{model} is a {pipeline.__name__}, which does not turn text alone into an image")

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    try:
        pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=dtype, use_safetensors=True)
    except SafetensorError as error:
        raise ValueError(f"{model} holds corrupt weights: {error}") from error
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def recommended_call(model: str | Path = DEMO_MODEL) -> dict[str, Any]:
    """Keyword arguments of the pipeline's call: `generation.json` in the model's folder, if it is there.

    Raises ValueError where that file holds anything else.
    """
    path = Path(model) / "generation.json"
    if not path.is_file():
        return {}
    try:
        call = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(call, dict):
        raise ValueError(f"{path} holds no JSON object")
    pipeline = _pipeline_class(model)
    if unknown := call.keys() - _arguments(pipeline):
        raise ValueError(f"{path}: {pipeline.__name__} takes no {', '.join(sorted(unknown))}")
    return call


def draws_from_text_alone(pipeline: type[DiffusionPipeline], video: bool = False) -> bool:
    """Whether a call with a prompt and no picture gives an image (video: or a video), as its signature tells."""
    arguments = _arguments(pipeline)
    if not {"prompt", "height", "callback_on_step_end"} <= arguments.keys():
        return False
    if "num_frames" in arguments and not video:
        return False
    required = {name for name, argument in arguments.items() if argument.default is argument.empty}
    # Where a picture is optional, as in FLUX.2, its type says so; its default is None in all pipelines.
    optional = "image" not in arguments or type(None) in get_args(arguments["image"].annotation)
    return optional and required <= {"prompt"} and not arguments.keys() & _PICTURES_IN


def _pipeline_class(model: str | Path) -> type[DiffusionPipeline]:
    _check_folder(model)
    try:
        name = DiffusionPipeline.load_config(model).get("_class_name")
    except OSError as error:
        raise OSError(
            f"cannot get {model} from the hub ({str(error).splitlines()[0]}); where there is a network: "
            f"hf download {model} --local-dir FOLDER, then give the folder"
        ) from error
    if not isinstance(name, str) or not hasattr(diffusers, name):
        raise ValueError(f"{model} is a {name!r} pipeline, which this Diffusers does not have")
    return getattr(diffusers, name)


def _arguments(pipeline: type[DiffusionPipeline]) -> dict[str, inspect.Parameter]:
    """The parameters of its call that have a name of their own, without self."""
    signature = inspect.signature(pipeline.__call__).parameters.items()
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name: argument for name, argument in signature if argument.kind in named and name != "self"}


def _check_folder(model: str | Path) -> None:
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise ValueError(f"{model} is no Diffusers pipeline: the folder has no model_index.json")
    elif folder.exists() or folder.is_absolute() or str(model).count("/") != 1 or str(model).startswith("."):
        raise ValueError(f"{model} is neither a folder nor a hub id (owner/name)")
