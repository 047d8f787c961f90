"""Check jobs against their models: each job that its model can draw becomes a task."""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

from dma_diffusers.errors import first_line
from dma_diffusers.pipelines.clip import KINDS, check_clip, clip_format
from dma_diffusers.pipelines.fingerprint import config_identity, file_fingerprint, model_fingerprint
from dma_diffusers.pipelines.jobs import CALL_FIELDS, Failure, Job
from dma_diffusers.pipelines.load import (
    ability,
    check_call,
    check_model,
    named_model,
    pipeline_class,
    recommended_call,
)
from dma_diffusers.pipelines.loras import Lora
from dma_diffusers.pipelines.loras import check as check_loras
from dma_diffusers.pipelines.loras import parse as parse_lora
from dma_diffusers.pipelines.picture import picture_format
from dma_diffusers.pipelines.placement import own_device
from dma_diffusers.pipelines.video import ClipCall, clip_call, read_image

_PROMPT_LETTERS = 40  # a default file name has this many letters of the prompt


@dataclass(frozen=True)
class Task:
    """A job that its model can draw.

    kind: the file's format, as `clip_format` names it, or `picture_format` where fps is None.
    model: a local folder or hub id. call: keyword arguments of the pipeline's call, without the image.
    settings: a digest of everything that decides how the picture or clip looks, the model's weights included, and not
    the path under which the job names the model. fps: frames per second of a clip, None for a picture. loras: are put
    on the model.
    """

    job: Job
    output: str
    kind: str
    model: str
    call: dict[str, Any]
    settings: str
    fps: float | None = None
    loras: tuple[Lora, ...] = ()

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of the pipeline's call, including the image."""
        if self.job.image is None:
            return self.call
        image = read_image(self.job.folder / self.job.image)
        return clip_call(self.model, **_clip_options(self.job), image=image).arguments | self.call


def tasks_of(jobs: Sequence[Job], drawn: Mapping[str, str] | None = None) -> tuple[list[Task], list[Failure]]:
    """Turn jobs into tasks, and those that their models cannot draw into failures.

    Tasks are sorted so that those of one model and one configuration follow each other. No weights are loaded. If two
    jobs ask for the same output, the second one is a failure. A job without an output gets a file of its own: one that
    was drawn with its settings before, wherever the job stands now, or else a new one.

    Args:
        drawn: the outputs of former runs that are whole, each with the settings that it was drawn with.
    """
    cached_call = cache(_result_or_error)  # so that a hub that does not answer is asked only once
    tasks: dict[str, Task] = {}
    unnamed, failures = [], []
    for job in jobs:
        try:
            task = _task(job, cached_call)
            if job.output is None:
                unnamed.append(task)
                continue
            if task.output in tasks:
                raise ValueError(f"{task.output} is the output of {tasks[task.output].job.where} already")
            tasks[task.output] = task
        except Exception as error:  # an error in one job or model must not stop the others
            failures.append(Failure(job.number, job.where, first_line(error)))
    tasks |= _with_own_files(unnamed, drawn or {}, tasks.keys())
    in_order = sorted(tasks.values(), key=lambda task: task.job.number)
    models = list(dict.fromkeys((task.model, task.loras) for task in in_order))
    configs = list(dict.fromkeys(task.job.config for task in in_order))
    together = sorted(in_order, key=lambda t: (models.index((t.model, t.loras)), configs.index(t.job.config)))
    return together, failures


def _task(job: Job, cached_call: Callable[..., tuple[Any, Exception | None]]) -> Task:
    def found(find: Callable, *about: Any) -> Any:
        value, error = cached_call(find, *about)
        if error:
            raise error
        return value

    model = str(named_model(job.model or ("demo-video" if _looks_like_a_clip(job) else "demo")))
    job.config.check_device(own_device())
    kind = found(pipeline_class, model)
    found(check_model, model, None, job.image is not None)
    image = found(_digest, job.folder / job.image) if job.image else None
    clips = ability(kind).video
    output = job.output or _default_name(job, ".mp4" if clips else ".png")
    if clips:
        file = clip_format(Path(output))
        clip = found(_clip_call, model, *_clip_options(job).items())
        call, fps = clip.arguments, clip.fps
        check_clip(file, clip.size, fps)
    else:
        file = picture_format(Path(output))
        call, fps = found(recommended_call, model) | _picture_call(job, kind.__name__), None
    call = call | {name: value for name in CALL_FIELDS if (value := getattr(job, name)) is not None}
    check_call(kind, call)
    of_model = found(model_fingerprint, model)
    decisive = [job.prompt, job.seed, found(config_identity, job.config), of_model, call, fps, image]
    loras = tuple(found(parse_lora, text, job.folder) for text in job.lora)
    check_loras(kind, loras)
    if loras:
        decisive.append([(found(file_fingerprint, lora.path), lora.weight) for lora in loras])
    settings = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]
    return Task(job, output, file, model, call, settings, fps, loras)


def _with_own_files(
    unnamed: Sequence[Task], drawn: Mapping[str, str], taken: Iterable[str]
) -> dict[str, Task]:
    """Return tasks by the outputs that they get: files of `drawn` of the same settings and kind, or new names."""
    used = set(taken)
    fitting = defaultdict(list)
    for output, settings in drawn.items():
        if output not in used:
            fitting[settings, Path(output).suffix].append(output)
    named: dict[str, Task] = {}
    waiting = []
    for task in unnamed:
        if found := fitting[task.settings, Path(task.output).suffix]:
            output = found.pop(0)
            named[output] = replace(task, output=output)
        else:
            waiting.append(task)
    used |= named.keys()
    for task in waiting:
        output = next(name for name in _variants(task.output) if name not in used)
        used.add(output)
        named[output] = replace(task, output=output)
    return named


def _variants(output: str) -> Iterator[str]:
    """Yield a file name, and then others like it."""
    path = Path(output)
    yield output
    yield from (f"{path.stem}-{number}{path.suffix}" for number in count(2))


def _looks_like_a_clip(job: Job) -> bool:
    return Path(job.output).suffix.lower() in KINDS if job.output else bool(job.frames or job.fps)


def _default_name(job: Job, suffix: str) -> str:
    words = re.sub(r"\W+", "-", job.prompt.lower())[:_PROMPT_LETTERS].strip("-")
    return "-".join(filter(None, (f"{job.number:04}", words, str(job.seed)))) + suffix


def _clip_options(job: Job) -> dict[str, Any]:
    return {"steps": job.steps, "frames": job.frames, "size": job.size, "fps": job.fps}


def _clip_call(model: str, *wanted: tuple[str, Any]) -> ClipCall:
    return clip_call(model, **dict(wanted))


def _picture_call(job: Job, pipeline: str) -> dict[str, Any]:
    if job.frames or job.fps:
        raise ValueError(f"frames and fps are for clips: {pipeline} draws pictures")
    width, height = job.size or (None, None)
    asked = {"num_inference_steps": job.steps, "width": width, "height": height}
    return {name: value for name, value in asked.items() if value is not None}


def _digest(image: Path) -> str:
    read_image(image)
    return file_fingerprint(image)


def _result_or_error(find: Callable, *about: Any) -> tuple[Any, Exception | None]:
    """Call `find`; return its result and None, or None and its error."""
    try:
        return find(*about), None
    except Exception as error:
        return None, error
