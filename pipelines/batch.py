"""Draw a batch of jobs: each process draws its share of the missing outputs, and failures are reported at the end."""

import gc
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from diffusers import DiffusionPipeline

from dma_diffusers.attach import apply, report, restore
from dma_diffusers.config import DMAConfig
from dma_diffusers.errors import first_line
from dma_diffusers.fingerprint import OTHER_WEIGHTS
from dma_diffusers.pipelines.clip import encode_clip
from dma_diffusers.pipelines.files import remove_leftovers, write_atomically
from dma_diffusers.pipelines.generate import Drawing, draw
from dma_diffusers.pipelines.jobs import Failure, Job
from dma_diffusers.pipelines.linears import calibrate_where_needed
from dma_diffusers.pipelines.load import load_pipeline
from dma_diffusers.pipelines.loras import Lora
from dma_diffusers.pipelines.picture import encode
from dma_diffusers.pipelines.results import Results
from dma_diffusers.pipelines.tasks import Task, tasks_of
from dma_diffusers.progress import OnStep
from dma_diffusers.receipt import Receipt

_DAMAGED = "what was there is not what was written (emptied, cut or changed since), and was drawn anew"


@dataclass(frozen=True)
class Outcome:
    """The result of a batch.

    drawn: the number of jobs drawn in this run. already_drawn: the number whose output an earlier run had drawn.
    notes: what a user should know of jobs that were drawn in this run, one line each.
    """

    drawn: int
    already_drawn: int
    failures: list[Failure]
    notes: list[str]


def batch(jobs: Sequence[Job], failures: Sequence[Failure], folder: Path, on_step: OnStep) -> Outcome | None:
    """Draw jobs into `folder`, and log how each ended in `folder`/results.jsonl.

    A job whose output exists and was drawn with the same settings is not drawn again. An error in one job does not
    stop the others. Under `accelerate launch` the processes share the jobs; only the first process returns an outcome,
    the others return None.

    Args:
        failures: jobs that cannot be drawn; they are logged too.
        on_step: is called after each job and after each denoising step.

    Raises OSError where something cannot be written.
    """
    state, results = PartialState(), Results(folder)
    plan: list[Any] = [None]
    if state.is_main_process:
        remove_leftovers(folder)
        drawn, damaged = _drawn(folder, results)
        tasks, impossible = tasks_of(jobs, drawn)
        impossible += failures
        for failure in impossible:
            results.append({"job": failure.where, "output": None, "error": failure.error})
        plan = [[task for task in tasks if drawn.get(task.output) != task.settings]]
    # Only one process looks for outputs: another one might start drawing before a slow one has looked.
    broadcast_object_list(plan)
    missing: list[Task] = plan[0]
    mine = missing[state.process_index :: state.num_processes]
    failed, notes = [], []
    if state.is_main_process:
        anew = [task for task in missing if task.output in damaged]
        notes = [(t.job.number, f"{t.job.where}, {t.output}: {_DAMAGED}") for t in anew]
    on_step("jobs", 0, len(mine))
    for done, (task, result) in enumerate(_draw(mine, folder, on_step), 1):
        results.append(_request(task) | result)
        where = f"{task.job.where}, {task.output}"
        if result["error"]:
            failed.append(Failure(task.job.number, where, result["error"]))
        notes += [(task.job.number, f"{where}: {note}") for note in result.get("notes", ())]
        on_step("jobs", done, len(mine))
    failed, notes = gather_object(failed), gather_object(notes)
    if not state.is_main_process:
        return None
    all_failures = sorted([*impossible, *failed], key=attrgetter("number"))
    in_order = [note for _, note in sorted(notes, key=itemgetter(0))]
    return Outcome(len(missing) - len(failed), len(tasks) - len(missing), all_failures, in_order)


def _drawn(folder: Path, results: Results) -> tuple[dict[str, str], set[str]]:
    """Return the outputs that former runs left whole, with the settings that they were drawn with, and the others.

    The others are there, but are not what was written: they were emptied, cut or changed since.
    """
    whole, damaged = {}, set()
    for output, result in results.last().items():
        if not output or result.get("error") or not (folder / output).is_file():
            continue
        if "checksum" not in result:
            continue  # a former version drew it
        if _checksum((folder / output).read_bytes()) == result["checksum"]:
            whole[output] = result["settings"]
        else:
            damaged.add(output)
    return whole, damaged


def _checksum(data: bytes) -> str:
    return f"{zlib.crc32(data):08x}"


def _request(task: Task) -> dict[str, Any]:
    job = task.job
    asked = {"job": job.where, "output": task.output, "prompt": job.prompt, "seed": job.seed}
    return asked | {"model": task.model, "config": _describe(job.config), "settings": task.settings}


def _describe(config: DMAConfig) -> str:
    linears = f", linears {config.linears}" if config.linears else ""
    if config.lowering == "stock":
        return f"stock attention{linears}"
    own = f", {len(config.modules)} modules of their own" if config.modules else ""
    return f"{config.high}|{config.low} {config.schedule or config.words}{own}{linears}"


def _draw(tasks: Sequence[Task], folder: Path, on_step: OnStep) -> Iterator[tuple[Task, dict[str, Any]]]:
    """Yield each task with its result; no more than one model is in memory at a time."""
    for (model, loras), group in groupby(tasks, attrgetter("model", "loras")):
        yield from _draw_with_model(model, loras, list(group), folder, on_step)
        gc.collect()
        torch.cuda.empty_cache()


def _draw_with_model(
    model: str, loras: Sequence[Lora], tasks: list[Task], folder: Path, on_step: OnStep
) -> Iterator[tuple[Task, dict[str, Any]]]:
    try:
        has_image = any(task.job.image is not None for task in tasks)
        pipe = load_pipeline(model, image=has_image, calls=[task.call for task in tasks], loras=loras)
    except Exception as error:
        yield from ((task, {"error": first_line(error)}) for task in tasks)
        return
    for config, members in groupby(tasks, attrgetter("job.config")):
        group = list(members)
        try:
            restore(pipe)  # linear layers of the jobs before would stay
            calibrate_where_needed(pipe, config, group[0].call, on_step)
            apply(pipe, config)
        except (ValueError, OSError) as error:
            yield from ((task, {"error": first_line(error)}) for task in group)
            continue
        for task in group:
            before = report(pipe)
            try:
                data, drawing = _draw_task(pipe, task, partial(on_step, "steps"))
            except Exception as error:  # an error in one job must not stop the others
                yield task, {"error": first_line(error)}
                continue
            write_atomically(folder / task.output, data)  # not caught: a full disk would fail every job
            after = report(pipe)
            used = _attention_used(before, after)
            others = any(OTHER_WEIGHTS in module.notes for module in after.modules)
            notes = [*drawing.notes, *[OTHER_WEIGHTS] * others]
            yield task, {
                "seconds": round(drawing.seconds, 3), "checksum": _checksum(data), "receipt": used, "notes": notes,
                "error": None,
            }  # fmt: skip


def _draw_task(
    pipe: DiffusionPipeline, task: Task, on_step: Callable[[int, int], None]
) -> tuple[bytes, Drawing]:
    """Draw a task; return the bytes of its file, and the drawing."""
    drawing = draw(pipe, [task.job.prompt], [task.job.seed], task.arguments(), on_step)
    if task.fps:
        return encode_clip(drawing.frames[0], task.fps, task.kind), drawing
    return encode(drawing.pictures[0], task.kind), drawing


def _attention_used(before: Receipt, after: Receipt) -> dict[str, Any]:
    """Count the attention calls between two receipts.

    The result says how many calls the plugin took, by which lowerings, how many went to stock attention for which
    reason, and what the guard turned.
    """
    fallbacks = sum((Counter(module.fallbacks) for module in after.modules), Counter())
    fallbacks -= sum((Counter(module.fallbacks) for module in before.modules), Counter())
    intercepted = [
        (module.lowering, module.intercepted - then.intercepted)
        for module, then in zip(after.modules, before.modules, strict=True)
    ]
    return {
        "intercepted": sum(calls for _, calls in intercepted),
        "lowerings": sorted({str(lowering) for lowering, calls in intercepted if calls}),
        "fallbacks": dict(fallbacks),
        "turned": [
            f"{module.module}: {words}"
            for module, then in zip(after.modules, before.modules, strict=True)
            for words in module.turned[len(then.turned) :]
        ],
    }
