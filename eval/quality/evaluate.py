"""An evaluation draws, scores and sums up, from prompts to `evaluation.json`; it does nothing again that is there."""

import inspect
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from accelerate import PartialState
from diffusers import DiffusionPipeline

from dma_diffusers.attach import check
from dma_diffusers.config import DMAConfig
from dma_diffusers.eval import provenance
from dma_diffusers.eval.cost import check_target
from dma_diffusers.eval.quality import samples
from dma_diffusers.eval.quality.calls import remarks_on, share_that_ran, shares_that_ran
from dma_diffusers.eval.quality.configurations import AGAIN, CONFIGURATION, FULL_PRECISION, Row, rows
from dma_diffusers.eval.quality.drawing import OnStep, draw_missing
from dma_diffusers.eval.quality.judge import Judge, caveats
from dma_diffusers.eval.quality.pictures import KnownBatches, Pictures, Sample, batches
from dma_diffusers.eval.quality.plan import Plan, estimate, share, time_step
from dma_diffusers.eval.quality.prompts import Prompt
from dma_diffusers.eval.quality.scoring import Batches
from dma_diffusers.eval.quality.summary import finite
from dma_diffusers.eval.quality.trajectory import Trajectory
from dma_diffusers.eval.quality.worst import worst
from dma_diffusers.eval.recordings.cost import predicted_cost
from dma_diffusers.eval.recordings.measure import layers, measure
from dma_diffusers.eval.recordings.record import record
from dma_diffusers.pipelines.files import remove_leftovers, temporary_folder, write_atomically
from dma_diffusers.pipelines.fingerprint import config_identity, model_fingerprint
from dma_diffusers.pipelines.linears import calibrate_where_needed
from dma_diffusers.pipelines.load import DEMO_MODEL, VIDEO_DEMO_MODEL, load_pipeline
from dma_diffusers.pipelines.loras import Lora
from dma_diffusers.pipelines.video import clip_call

_STEPPED = 8  # at most so many samples have their steps measured one by one
_RECORDED = 2  # so many prompts have their attention calls recorded, for errors by layer
_DIGITS = 6  # a stored score has so many, because more are rounding noise
_EMBEDDED = {DEMO_MODEL: "demo", VIDEO_DEMO_MODEL: "demo-video"}


@dataclass(frozen=True)
class Request:
    """A request says what an evaluation draws and compares.

    model: local folder or hub id. seeds: each prompt is drawn with each of them. batch: samples drawn together. call:
    further arguments of the pipeline's call. configurations: by name, beside full precision. target: the GPU whose
    attention's cost is predicted, by architecture. loras: are put on the model. samples_for: the benchmark that all
    pictures or clips are written for, one of `samples.BENCHMARKS`.
    """

    model: str | Path
    prompts: Sequence[Prompt]
    seeds: Sequence[int]
    batch: int
    call: dict[str, Any]
    configurations: dict[str, DMAConfig]
    target: str = "sm_100"
    loras: Sequence[Lora] = ()
    samples_for: str | None = None


@dataclass(frozen=True)
class _Prepared:
    """The parts that an evaluation has made before it draws anything.

    pictures: of each row, full precision's first drawing among them, by name. stepped: the batches of which the steps
    are measured, as far as they are.
    """

    pipe: DiffusionPipeline
    compared: Sequence[Row]
    chunks: list[list[Sample]]
    together: KnownBatches
    settings: dict[str, Any]
    machine: dict[str, Any]
    pictures: dict[str, Pictures]
    stepped: list[list[Sample]]

    @property
    def rows(self) -> list[Row]:
        return [FULL_PRECISION, *self.compared]


def _prepare(request: Request, judge: Judge | None, folder: Path, on_step: OnStep) -> _Prepared:
    check_target(request.target)
    compared = rows(request.configurations)
    together = KnownBatches(folder / "pictures", request.batch)
    chunks = batches(request.prompts, request.seeds, request.batch, together.read())
    pipe = load_pipeline(request.model, calls=[request.call], loras=request.loras)
    for config in request.configurations.values():
        calibrate_where_needed(pipe, config, request.call, on_step)
    check(pipe, request.configurations)
    if judge:
        judge.check(_draws_clips(pipe))
    if request.samples_for:
        samples.check(request.samples_for, _draws_clips(pipe))
    settings = {
        "model": model_fingerprint(request.model),
        "pipeline": type(pipe).__name__,
        "call": request.call,
    }
    if request.loras:
        settings["loras"] = [lora.identity for lora in request.loras]
    machine = {"versions": provenance.versions(), "hardware": provenance.hardware()}
    pictures = {
        row.name: Pictures(folder / "pictures", row.name, settings | machine | identity_of_row(row))
        for row in (FULL_PRECISION, *compared)
    }
    stepped = [chunk[:_STEPPED] for chunk in chunks[: max(_STEPPED // request.batch, 1)]]
    return _Prepared(pipe, compared, chunks, together, settings, machine, pictures, stepped)


def _tell(ready: _Prepared, request: Request, judge: Judge, say: Callable[[str], None]) -> None:
    """Say what will be drawn, and then, after a step of each row, about how long it takes."""
    video = _draws_clips(ready.pipe)
    shares = {name: share(of_row, ready.chunks) for name, of_row in ready.pictures.items()}
    plan = Plan(
        "clips" if video else "pictures",
        len(request.prompts),
        len(request.seeds),
        shares,
        len(ready.stepped),
        min(_RECORDED, len(request.prompts)),
        judge.metrics(video),
    )
    say(str(plan))
    steps = {}
    for row in ready.rows:
        if row == AGAIN:  # it takes as long as the first drawing
            steps[row.name] = steps[FULL_PRECISION.name]
            continue
        with _named(row):
            steps[row.name] = time_step(ready.pipe, row, ready.chunks[0], request.call)
    say(estimate(plan, steps, len(ready.chunks[0]), PartialState().num_processes))


def tell_plan(
    request: Request, judge: Judge, folder: Path, on_step: OnStep, say: Callable[[str], None]
) -> None:
    """Say what `evaluate` would draw in `folder`, and about how long it would take; draw nothing but two steps a row.

    Raises as `evaluate` does before it draws.
    """
    _tell(_prepare(request, judge, folder, on_step), request, judge, say)


def evaluate(
    request: Request,
    judge: Judge | None,
    folder: Path,
    command: str,
    notes: Sequence[str],
    on_step: OnStep,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any] | None:
    """Draw what is missing in `folder`, score it, write `folder`/evaluation.json, and return what that holds.

    judge: None in processes other than the first. say: is told the plan, and about how long it takes. Under `accelerate
    launch` all draw, into a folder that they share; the first one scores, and the others return None. Raises
    ValueError, naming the row, where one draws NaN, and before anything is drawn where the model cannot have a
    configuration.
    """
    ready = _prepare(request, judge, folder, on_step)
    pipe, compared, chunks, pictures = ready.pipe, ready.compared, ready.chunks, dict(ready.pictures)
    settings, machine, stepped = ready.settings, ready.machine, ready.stepped
    if judge:
        _tell(ready, request, judge, say)
        remove_leftovers(folder)
        ready.together.write(chunks)
    corrupt = []
    for row in ready.rows:
        with _named(row):
            corrupt += draw_missing(pipe, row, pictures[row.name], chunks, request.call, on_step)
    if judge is None:
        return None

    trajectory = Trajectory(pipe, FULL_PRECISION, stepped, request.call, on_step)
    steps = {row.name: trajectory.step_errors(row) for row in compared}
    receipts = {row.name: pictures[row.name].receipt() for row in compared}
    of_layers, costs, remarks_on_layers = _layers(pipe, request, receipts, folder, on_step)
    del pipe, trajectory, ready

    written: list[str] = []
    if request.samples_for:
        fps = clip_call(request.model).fps if request.samples_for == "vbench" else 0
        written = samples.write_samples(pictures, chunks, len(request.seeds), folder / "samples", fps)
    exact = pictures.pop(FULL_PRECISION.name)
    judged, remarks = judge.judge(exact, pictures, chunks, len(request.seeds))
    remarks += written + truncated(exact, chunks)
    results = {
        row.name: {
            "role": row.role,
            "config": row.config and asdict(row.config),
            "seconds_per_picture": _seconds(pictures[row.name], chunks),
            "predicted_cost": costs.get(row.name),
            "ran": share_that_ran(receipts[row.name]) if row.role == CONFIGURATION else None,
            "summary": judged[row.name].summary,
            "pictures": {name: _stored(scores) for name, scores in judged[row.name].samples.items()},
            "frames": {name: _stored(scores) for name, scores in (judged[row.name].frames or {}).items()},
            "steps": _stored(steps[row.name]),
            "receipt": receipts[row.name],
        }
        for row in compared
    }
    remarks += [f"{path.relative_to(folder)} was corrupt and was drawn anew" for path in corrupt]
    remarks_on_rows = [
        remark
        for name, config in request.configurations.items()
        for remark in remarks_on(name, receipts[name], config.linears)
    ]
    scored = set[str]().union(*(row["summary"] for row in results.values()))
    shown = next(iter(request.configurations))
    evaluation = {
        "command": command,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": settings
        | {"model": _EMBEDDED.get(request.model, str(request.model))}
        | {"fingerprint": settings["model"], "batch": request.batch}
        | {"prompts": len(request.prompts), "seeds": len(request.seeds), "seed": request.seeds[0]}
        | {"stepped": sum(map(len, stepped)), "target": request.target}
        | (
            {"frames": len(next(iter(of_frames.values())))} if (of_frames := results[shown]["frames"]) else {}
        ),
        **machine,
        "sources": provenance.sources(),
        "prompts": [asdict(prompt) for prompt in request.prompts],
        "notes": [*remarks_on_rows, *notes, *caveats(judged), *remarks, *remarks_on_layers],
        "metrics": {name: column for name, column in judge.columns.items() if name in scored},
        "rows": results,
        "layers": of_layers,
        "worst": worst(
            {name: (pictures[name], judged[name].samples["lpips"]) for name in request.configurations},
            exact,
            chunks,
            len(request.seeds),
            "lpips",
            folder,
        ),
    }
    write_atomically(folder / "evaluation.json", json.dumps(evaluation, allow_nan=False).encode())
    return evaluation


def _layers(
    pipe: DiffusionPipeline,
    request: Request,
    receipts: dict[str, Any],
    folder: Path,
    on_step: OnStep,
) -> tuple[dict[str, Any] | None, dict[str, float | None], list[str]]:
    """Return each attention module's own error and each configuration's predicted cost on recorded calls, and remarks.

    receipts: what ran, by row: calls that were left to stock attention cost what that does.

    Errors and costs are left out where recordings take too much room.
    """
    texts = [prompt.text for prompt in request.prompts[:_RECORDED]]
    with temporary_folder(folder) as scratch:
        try:
            recordings = record(pipe, texts, scratch, request.call, on_step=on_step)
        except ValueError as error:
            return None, {}, [f"no errors by layer, no predicted costs: {error}"]
        costs = {
            name: predicted_cost(recordings, config, request.target, shares_that_ran(receipts[name]))
            for name, config in request.configurations.items()
        }
        errors = layers(recordings, measure(recordings, request.configurations, on_step=on_step))
        return errors, costs, recordings.notes


def _draws_clips(pipe: DiffusionPipeline) -> bool:
    return "num_frames" in inspect.signature(type(pipe).__call__).parameters


def truncated(exact: Pictures, chunks: Batches) -> list[str]:
    """Say how many prompts the pipeline did not read to their end."""
    samples = {sample.prompt.text: sample for chunk in chunks for sample in chunk}
    notes = [note for note in map(exact.notes, samples.values()) if note]
    return (
        [f"{len(notes)} of {len(samples)} prompts were not read to the end, the first: {notes[0][0]}"]
        if notes
        else []
    )


@contextmanager
def _named(row: Row) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{row.name}: {error}") from error


def identity_of_row(row: Row) -> dict[str, Any]:
    """Return what makes the pictures of a row its own; our sources belong to it only where they have a say."""
    own: dict[str, Any] = {"role": row.role}
    if row.config is None:
        return own
    return own | {"config": config_identity(row.config), "sources": provenance.sources()}


def _seconds(pictures: Pictures, chunks: Batches) -> float:
    """Return the median batch's seconds for each picture; a mean would hold the first batch, which compiles."""
    return statistics.median(pictures.seconds(batch[0]) for batch in chunks)


def _stored(values: Sequence[float]) -> list[float | None]:
    return [finite(float(f"{value:.{_DIGITS}g}")) for value in values]
