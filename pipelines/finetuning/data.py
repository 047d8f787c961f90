"""Read a folder of pictures or clips with their captions, and store them as calls of a transformer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageOps, ImageSequence

from dma_diffusers.pipelines.files import files_below
from dma_diffusers.pipelines.finetuning.calls import LATENTS, NOISE, first_call
from dma_diffusers.pipelines.finetuning.latents import encode
from dma_diffusers.pipelines.finetuning.store import CallStore
from dma_diffusers.pipelines.reading import UNREADABLE, to_rgb
from dma_diffusers.pipelines.tables import read_entries
from dma_diffusers.pipelines.video import read_image

CLIPS = (".mp4", ".mov", ".webm", ".gif", ".webp")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".tif", ".tiff")
_TABLES = ("metadata.jsonl", "metadata.csv")
_CAPTIONS = ("text", "caption", "prompt")


@dataclass(frozen=True)
class Example:
    """A picture or clip, and the caption that it illustrates."""

    path: Path
    caption: str


def read_folder(folder: Path, video: bool) -> list[Example]:
    """Read the examples of a folder, in the order of their names.

    A caption is in a text file beside its picture (`cat.png`, `cat.txt`), or all are in `metadata.jsonl` or
    `metadata.csv`, whose entries have `file_name` and `text` (or `caption`, `prompt`), as Hugging Face's folders do.

    Raises ValueError for a folder without pictures (or clips), and for examples without a caption, which it names.
    """
    suffixes, kind = (CLIPS, "clips") if video else (PICTURES, "pictures")
    paths = sorted(path for path in files_below(folder) if path.suffix.lower() in suffixes)
    if not paths:
        raise ValueError(f"{folder} holds no {kind}: give a folder of {', '.join(suffixes)} with captions")
    table = next((folder / name for name in _TABLES if (folder / name).is_file()), None)
    captions = dict(_captions_of_table(table)) if table else {}
    examples = [Example(path, captions.get(path) or _caption_beside(path)) for path in paths]
    if missing := [example.path.name for example in examples if not example.caption]:
        raise ValueError(
            f"{folder}: {len(missing)} {kind} have no caption, the first is {missing[0]}: write it into "
            f"{Path(missing[0]).stem}.txt beside it, or into {_TABLES[0]}"
        )
    return examples


def store_examples(
    pipe: DiffusionPipeline,
    model: torch.nn.Module,
    examples: Sequence[Example],
    call: Mapping[str, Any],
    store: CallStore,
    on_step: Callable[[str, int, int], None],
) -> list[float]:
    """Encode the examples that are not in the store yet, and return the noise levels of the pipeline's schedule.

    call: with its width and height. Pictures are cropped around their middle to these. Of a clip, the first frames are
    taken.
    """
    size, count = (call["width"], call["height"]), call.get("num_frames", 1)
    there = store.stored()
    for number, example in enumerate(examples):
        if number not in there:
            asked = first_call(pipe, model, example.caption, call)
            latents = encode(pipe, frames_of(example.path, size, count))
            clean = {
                LATENTS: latents.to(asked.inputs[LATENTS].dtype).cpu(),
                NOISE: asked.inputs[NOISE] / float(pipe.scheduler.sigmas[0]),
            }
            store.write([number], [replace(asked, inputs={**asked.inputs, **clean})])
        on_step("encoding", number + 1, len(examples))
    # The schedule is a call's, which there was none of if all were stored.
    first_call(pipe, model, examples[0].caption, call)
    return pipe.scheduler.sigmas.tolist()


def frames_of(path: Path, size: tuple[int, int], count: int) -> torch.Tensor:
    """Read the first `count` frames of a file, cropped to (width, height): uint8 `[count, height, width, 3]`.

    Raises ValueError for a clip that is shorter, OSError for a file that can't be read.
    """
    frames = [read_image(path)] if count == 1 else []
    if count > 1:
        for frame in _frames(path):
            frames.append(frame)
            if len(frames) == count:
                break
    if len(frames) < count:
        raise ValueError(f"{path} has {len(frames)} frames, and {count} are wanted: give a smaller --frames")
    return torch.from_numpy(np.stack([np.asarray(ImageOps.fit(frame, size)) for frame in frames]))


def _frames(path: Path) -> Iterator[Image.Image]:
    try:
        if path.suffix.lower() in (".gif", ".webp"):
            with Image.open(path) as clip:
                yield from (to_rgb(frame) for frame in ImageSequence.Iterator(clip))
            return
        import av

        with av.open(str(path)) as file:
            yield from (frame.to_image() for frame in file.decode(video=0))
    except ImportError as error:
        raise ValueError(
            f"{path} needs PyAV (pip install 'dma-diffusers[demo]'); .webp and .gif don't"
        ) from error
    except UNREADABLE as error:
        raise OSError(f"cannot read {path}: it holds no clip that can be read") from error


def _captions_of_table(path: Path) -> Iterator[tuple[Path, str]]:
    for where, entry in read_entries(path, (path.suffix,), "captions"):
        if not isinstance(entry, dict) or "file_name" not in entry:
            raise ValueError(f"{path}: {where} has no file_name")
        caption = next((str(entry[name]).strip() for name in _CAPTIONS if entry.get(name)), "")
        yield path.parent / str(entry["file_name"]), caption


def _caption_beside(path: Path) -> str:
    beside = path.with_suffix(".txt")
    return beside.read_text().strip() if beside.is_file() else ""
