"""Load pipelines that draw pictures or clips, and read the call arguments that their folders recommend."""

import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.utils import is_ftfy_available
from safetensors import SafetensorError

from dma_diffusers.pipelines.damage import check_files, damaged_file
from dma_diffusers.pipelines.loras import Lora, add
from dma_diffusers.pipelines.placement import Size, place

DEMO_MODEL = Path(__file__).parent / "demo" / "flux"
VIDEO_DEMO_MODEL = Path(__file__).parent / "demo_video" / "wan"
_DEMOS = {"demo": DEMO_MODEL, "demo-video": VIDEO_DEMO_MODEL}
# A pipeline with one of these arguments edits or follows a picture; `ability` checks "image" and "video" itself.
_IMAGE_INPUTS = {"strength", "mask_image", "control_image"}
_COUNT_ARGUMENTS = {"height", "width", "num_frames", "num_inference_steps"}
# These pipelines have no callback after each step, but they call their scheduler once in each step.
_NO_CALLBACK = {"HunyuanVideo15Pipeline", "HunyuanVideo15ImageToVideoPipeline"}
# For these families, Diffusers' documentation loads these components in float32 and the others in bfloat16.
_FLOAT32_FAMILIES = ("Wan", "SkyReelsV2", "ChronoEdit", "Allegro")
_FLOAT32_COMPONENTS = ("vae", "image_encoder")
# These pipelines call ftfy without checking that it is installed.
_NEED_FTFY = ("WanImageToVideo", "WanVACE", "SkyReelsV2", "ChronoEdit", "Helios")


@dataclass(frozen=True)
class Ability:
    """The inputs and the output of a pipeline, derived from the signature of its call.

    video: it draws clips, not pictures. from_text: a prompt alone is enough. from_image: a prompt and the first frame
    are enough.
    """

    video: bool
    from_text: bool
    from_image: bool


def named_model(name: str | None) -> str | Path:
    """Return the folder of an embedded model for "demo", None, "demo-video" and paths to it, other names unchanged."""
    if name is None or name in _DEMOS:
        return _DEMOS[name or "demo"]
    return next((folder for folder in _DEMOS.values() if folder.resolve() == Path(name).resolve()), name)


def load_pipeline(
    model: str | Path = DEMO_MODEL,
    video: bool | None = None,
    image: bool = False,
    calls: Iterable[Mapping[str, Any]] = (),
    say: Callable[[str], None] = lambda line: None,
    loras: Sequence[Lora] = (),
) -> DiffusionPipeline:
    """Load the pipeline of a local folder or hub id, on the GPU in bfloat16, or on the CPU in float32.

    A VAE stays in float32 where Diffusers' documentation asks for it, as for Wan. Weights that do not fit the GPU stay
    in the CPU's memory until they are needed, and a VAE decodes in tiles if it has no room to decode at once. Only
    safetensors are read, and no code that comes with a model is run.

    Args:
        video, image: as for `check_model`.
        calls: keyword arguments of the coming calls; their height, width and frames decide what fits the GPU.
        say: is called with one line that tells where the weights were placed.
        loras: are put on it.

    Raises what `check_model` raises, and ValueError for corrupt weights and other damaged files, which it names, and
    for LoRAs that the pipeline can't have.
    """
    check_model(model, video, image)
    kind = pipeline_class(model)
    dtype: Any = torch.float32
    if torch.cuda.is_available():
        dtype = {"default": torch.bfloat16}
        if kind.__name__.startswith(_FLOAT32_FAMILIES):
            dtype |= dict.fromkeys(_FLOAT32_COMPONENTS, torch.float32)
    is_local = Path(model).is_dir()
    if is_local:
        check_files(Path(model))
    try:
        pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=dtype, use_safetensors=True)
    except SafetensorError as error:
        raise ValueError(f"{model} holds corrupt weights: {error}") from error
    except Exception as error:  # each library has its own for a file that it can't read
        if damaged := damaged_file(Path(model)) if is_local else "":
            raise ValueError(damaged) from error
        raise
    add(pipe, loras)
    say(place(pipe, [_size(kind, call) for call in calls] or [_size(kind, {})]))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def outline(model: str | Path) -> DiffusionPipeline:
    """Build the pipeline without weights: its Diffusers models are on the meta device, other components are None.

    It tells, without loading anything, how much the VAE compresses and which sizes the transformer expects.
    """
    kind, parts = pipeline_class(model), {}
    index = DiffusionPipeline.load_config(model)
    for name in inspect.signature(kind.__init__).parameters.keys() & index.keys():
        if not isinstance(index[name], list | tuple):
            parts[name] = index[name]
            continue
        library, class_name = index[name]
        part = getattr(diffusers, class_name, None) if library == "diffusers" else None
        parts[name] = None
        if isinstance(part, type) and issubclass(part, ModelMixin):
            with torch.device("meta"):  # mypy is not shown Diffusers' classes
                parts[name] = part.from_config(part.load_config(model, subfolder=name))  # type: ignore[attr-defined]
    return kind(**parts)


def check_model(model: str | Path, video: bool | None = None, image: bool = False) -> None:
    """Check that a model can draw what is asked for.

    Args:
        video: True to draw clips, False to draw pictures, None if both are fine.
        image: True if an image to start from is given.

    Raises ValueError if it cannot, OSError if the model cannot be read or fetched.
    """
    kind = pipeline_class(model)
    can, named = ability(kind), f"{model} is a {kind.__name__}"
    if not (can.from_text or can.from_image):
        raise ValueError(f"{named}, which does not turn text alone into an image, nor an image into a clip")
    if video is False and can.video:
        raise ValueError(f"{named}, which draws clips: dma-diffusers generate-video is for those")
    if video and not can.video:
        raise ValueError(f"{named}, which draws pictures: dma-diffusers generate is for those")
    if image and not can.from_image:
        raise ValueError(f"{named}, which takes no image to start from: leave it out")
    if not image and not can.from_text:
        raise ValueError(f"{named}, which starts from an image: dma-diffusers generate-video --image FILE")
    if kind.__name__.startswith(_NEED_FTFY) and not is_ftfy_available():
        raise ValueError(f"{named}, which needs ftfy: pip install 'dma-diffusers[demo]'")


def check_call(pipeline: type[DiffusionPipeline], call: Mapping[str, Any]) -> None:
    """Raise ValueError if the call of a pipeline of this class does not take one of these keyword arguments."""
    if unknown := call.keys() - arguments(pipeline):
        raise ValueError(f"{pipeline.__name__} takes no {', '.join(sorted(unknown))}")


def recommended_call(model: str | Path = DEMO_MODEL) -> dict[str, Any]:
    """Return keyword arguments of the pipeline's call from `generation.json` in the model's folder, if it exists.

    Raises ValueError if that file holds anything else.
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
    try:
        check_call(pipeline_class(model), call)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for name in _COUNT_ARGUMENTS & call.keys():
        if type(call[name]) is not int or call[name] < 1:
            raise ValueError(f"{path}: {name} must be a whole number from 1, got {call[name]!r:.100}")
    return call


def ability(pipeline: type[DiffusionPipeline]) -> Ability:
    """Tell from the signature of a pipeline class which inputs it needs, and whether it draws clips."""
    given = arguments(pipeline)
    video = "num_frames" in given
    steps = "callback_on_step_end" in given or pipeline.__name__ in _NO_CALLBACK
    if "prompt" not in given or not steps:
        return Ability(video, from_text=False, from_image=False)
    required = {name for name, argument in given.items() if argument.default is argument.empty}
    # The default is None even in pipelines that need a picture. Only the type tells that it is optional, as in FLUX.2.
    optional = all(
        type(None) in get_args(given[name].annotation) for name in {"image", "video"} & given.keys()
    )
    return Ability(
        video,
        from_text=optional and required <= {"prompt"} and not given.keys() & _IMAGE_INPUTS,
        from_image=video and "image" in given and required <= {"prompt", "image"},
    )


def arguments(pipeline: type[DiffusionPipeline]) -> dict[str, inspect.Parameter]:
    """Return the named parameters of the pipeline's call, without self."""
    signature = inspect.signature(pipeline.__call__).parameters.items()
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name: argument for name, argument in signature if argument.kind in named and name != "self"}


def pipeline_class(model: str | Path) -> type[DiffusionPipeline]:
    """Return the pipeline class that a local folder or hub id names.

    Raises ValueError if the installed Diffusers has no such pipeline, OSError if it cannot be read or fetched.
    """
    _check_folder(model)
    try:
        index = DiffusionPipeline.load_config(model)
    except OSError as error:
        if Path(model).is_dir():
            raise ValueError(f"{Path(model) / 'model_index.json'} is not JSON") from error
        raise OSError(
            f"cannot get {model} from the hub ({str(error).splitlines()[0]}); where there is a network: "
            f"hf download {model} --local-dir FOLDER, then give the folder"
        ) from error
    name = index.get("_class_name") if isinstance(index, dict) else None
    if not isinstance(name, str) or not hasattr(diffusers, name):
        raise ValueError(f"{model} is a {name!r} pipeline, which this Diffusers does not have")
    return getattr(diffusers, name)


def _size(pipeline: type[DiffusionPipeline], call: Mapping[str, Any]) -> Size:
    """Return the size that a call draws, assuming sides of 1,024 and 128 frames where they are not known."""
    known = {name: argument.default for name, argument in arguments(pipeline).items()} | dict(call)
    height, width = (known.get(name) or 1024 for name in ("height", "width"))
    # A clip's VAE needs more memory for one frame than a picture's VAE: one frame counts as three.
    frames = max(known["num_frames"] or 128, 3) if "num_frames" in known else 1
    return Size(height * width, frames)


def _check_folder(model: str | Path) -> None:
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            said = f"{model} is no Diffusers pipeline: the folder has no model_index.json"
            if (folder / "loss.jsonl").is_file():
                said += (
                    "; `finetune` wrote it: load its transformer/ or lora/ into the model that was trained"
                )
            raise ValueError(said)
    elif folder.exists() or folder.is_absolute() or str(model).count("/") != 1 or str(model).startswith("."):
        raise ValueError(f"{model} is neither a folder nor a hub id (owner/name)")
