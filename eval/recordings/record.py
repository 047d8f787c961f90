"""This module records the inputs of a pipeline's attention, while it draws with full precision."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import DiffusionPipeline
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.hooks import RemovableHandle

from dma_diffusers.attach import apply, interceptions, restore_attention
from dma_diffusers.components import transformers_of
from dma_diffusers.config import DMAConfig
from dma_diffusers.eval import provenance
from dma_diffusers.eval.recordings.store import (
    INDEX,
    Recording,
    Recordings,
    Tensors,
    read_recordings,
    serialise,
)
from dma_diffusers.kernels.operator import Result
from dma_diffusers.pipelines.files import write_atomically

LIMIT = 2_000_000_000
_HEADER = 1024  # at most so many bytes of a file are no tensor's


class StepObserver(Protocol):
    """Something that observes a model while it draws, step by step."""

    def step_begins(self, step: int) -> None:
        """Take note that this denoising step, counted from 0, is next."""


class _Full(ValueError):
    """It is raised when a prompt takes more than is left of the limit."""


def record(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    folder: Path,
    call: dict[str, Any],
    *,
    seeds: Sequence[int] | None = None,
    modules: Sequence[int | str] | None = None,
    steps: int | Sequence[int] = 3,
    limit: int = LIMIT,
    text: str | None = None,
    grid: tuple[int, ...] | None = None,
    on_step: Callable[[str, int, int], None] = lambda title, done, total: None,
) -> Recordings:
    """Record q, k and v of attention modules at some steps of each prompt, in `folder`, which is made.

    call: keyword arguments of the pipeline's call. seeds: one a prompt, 0, 1, … if left out. modules: indices into
    those that DMA would take, or their names; None for all. steps: so many, evenly spread from the first to the last,
    or which. limit: bytes that the folder may take. text, grid: as in `DMAConfig`. on_step: called after each denoising
    step with a title, steps done, steps in all.

    Calls that DMA would leave to stock whatever its formats, such as cross-attention, are not recorded. Every call of
    the transformer in a step is: with true classifier-free guidance, the conditional and the unconditional one, because
    both run at low precision and both move the picture. DMA attention that was applied is removed.

    Prompts are drawn one at a time; before the first, one step measures what a prompt takes. As many prompts are
    recorded as fit into `limit`, and a note says so; a longer one that does not fit after all ends them. A folder with
    recordings of the same settings is completed, prompt by prompt. Raises ValueError where not even one prompt fits,
    nothing can be recorded, or the folder has other recordings.
    """
    if not prompts:
        raise ValueError("there are no prompts to record")
    seeds = list(range(len(prompts))) if seeds is None else list(seeds)
    if len(seeds) != len(prompts):
        raise ValueError(f"give one seed a prompt, got {len(seeds)} for {len(prompts)}")
    with _recorder_on(pipe, text, grid) as recorder:
        chosen = _chosen_modules(modules, recorder.available)
        draw = partial(draw_observed, pipe, call)
        bytes_of_step, total = recorder.measure(partial(draw, prompts[0], seeds[0]), chosen)
        which = _chosen_steps(steps, total)
        settings = {
            "pipeline": type(pipe).__name__, "model": recorder.model, "prompts": list(prompts), "seeds": seeds,
            "call": json.loads(json.dumps(call)), "modules": chosen, "steps": which,
            "adapters": recorder.adapters, "versions": provenance.versions(), "hardware": provenance.hardware(),
        }  # fmt: skip
        bytes_of_prompt = bytes_of_step * len(which)
        if bytes_of_prompt > limit:
            raise ValueError(
                f"one prompt takes {_gigabytes(bytes_of_prompt)} ({len(chosen)} modules at {len(which)} steps), more "
                f"than the limit of {_gigabytes(limit)}: choose fewer modules or steps, or a higher limit"
            )
        fitting = min(len(prompts), limit // bytes_of_prompt)
        recordings = _resumed(folder, settings)
        for number in range(fitting):
            if number in recordings.prompts:
                continue
            show = partial(on_step, f"recording {number + 1} of {fitting}")
            recorder.begin(recordings, number, chosen, limit)
            try:
                draw(prompts[number], seeds[number], show, recorder)
            except _Full:
                for recording in recorder.taken:
                    (folder / recording.file).unlink()
                if not recordings.prompts:
                    raise
                break
            recordings.recordings = sorted([*recordings, *recorder.taken], key=lambda taken: taken.prompt)
            recordings.sigmas = list(recorder.sigmas.values())
            recordings.save()
        recorded = len(recordings.prompts)
        left_out = f"{recorded} of {len(prompts)} prompts fit into {_gigabytes(limit)}"
        recordings.notes = [left_out] if recorded < len(prompts) else []
        recordings.save()
        return recordings


@contextmanager
def _recorder_on(
    pipe: DiffusionPipeline, text: str | None, grid: tuple[int, ...] | None
) -> Iterator["_Recorder"]:
    """Put a recorder in the place of the operator; afterwards everything is as stock as it can be."""
    models = [model for prefix, model in transformers_of(pipe) if prefix.startswith("transformer")]
    apply(pipe, DMAConfig(min_length=0, text=text, grid=grid))
    hooks: list[RemovableHandle] = []
    try:
        yield _Recorder(models, hooks)
    finally:
        for hook in hooks:
            hook.remove()
        restore_attention(pipe)


class _Recorder:
    """A recorder stands in for the operator in all modules of a pipeline's transformers.

    It runs stock attention, and saves. model: what an index says of the transformers. adapters: a digest of their
    LoRAs, None without any. available: names of the modules that DMA takes.
    """

    def __init__(self, models: Sequence[torch.nn.Module], hooks: list[RemovableHandle]):
        found = [interceptions(model) for model in models]
        if len({(type(model), *of_model) for model, of_model in zip(models, found, strict=True)}) > 1:
            kinds = ", ".join(type(model).__name__ for model in models)
            raise ValueError(
                f"the pipeline has transformers of different kinds ({kinds}): record one model alone"
            )
        self.available = list(found[0])
        self.model = {
            "class": type(models[0]).__name__,
            "modules": self.available,
            "fingerprint": provenance.weights_fingerprint(*models),
        }
        self.adapters = provenance.adapters_fingerprint(*models)
        for model, of_model in zip(models, found, strict=True):
            for name, interception in of_model.items():
                interception.stand_in = partial(self._attend, name)
                forward = interception.forward
            hooks.append(model.register_forward_pre_hook(partial(self._observe, forward), with_kwargs=True))
        self.take: Callable[..., None] = lambda *_: None
        self.sigmas: dict[int, float | None] = {}

    def measure(self, draw: Callable, chosen: list[str]) -> tuple[int, int]:
        """Return the bytes that one step of a drawing would take, and its number of steps; draws that step alone."""
        sizes = []

        def take(module: str, tensors: Tensors, *_: Any) -> None:
            if module in chosen and self.step == 0:  # not every pipeline can be stopped after its first step
                sizes.append(_HEADER + sum(x.numel() * x.element_size() for x in tensors if x is not None))

        self.take = take
        steps = draw(lambda done, total: None, self, stops_at_once=True)
        if not sizes:
            raise ValueError("nothing to record: DMA would leave every attention call to stock")
        return sum(sizes), steps

    def begin(self, recordings: Recordings, prompt: int, chosen: list[str], limit: int) -> None:
        """Save the chosen modules' calls from now on, as those of a prompt."""
        self.taken: list[Recording] = []
        self.sigmas = {}
        steps, left = recordings.settings["steps"], limit - recordings.bytes

        def take(module: str, tensors: Tensors, *values: Any) -> None:
            nonlocal left
            if module not in chosen or self.step not in steps:
                return
            names = (
                "prompt",
                "step",
                "call",
                "module",
                "sigma",
                "shape",
                "text",
                "grid",
                "scale",
                "is_causal",
            )
            sigma = self.sigmas[self.step]
            values = (prompt, self.step, self.call, module, sigma, tuple(tensors.q.shape), *values)
            data = serialise(tensors, names, values)
            left -= len(data)
            if left < 0:
                raise _Full(
                    f"prompt {prompt + 1} takes more than its first step foretold, and more than the limit of "
                    f"{_gigabytes(limit)}: choose fewer modules or steps, or a higher limit"
                )
            file = f"{prompt:04d}-{self.step:04d}-{self.call}-{module}.safetensors"
            write_atomically(recordings.folder / file, data)
            self.taken.append(Recording(**dict(zip(names, values, strict=True)), file=file, bytes=len(data)))

        self.take = take

    def step_begins(self, step: int) -> None:
        self.step, self.call = step, -1

    def _observe(self, forward: Any, model: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.call += 1
        sigma = forward.noise_level(args, kwargs)
        self.sigmas[self.step] = None if sigma is None else float(sigma)
        self.grid = forward.find_grid(model, args, kwargs)

    def _attend(
        self, module: str, q, k, v, *, key_mask, scale, is_causal, text_start, text_stop, parts=None, **_
    ) -> Result:
        if parts is not None:
            raise ValueError(
                "a recording is made on one GPU: record before enable_parallelism, or without it"
            )
        is_grid = math.prod(self.grid) == q.shape[2] - (text_stop - text_start)
        grid = self.grid if is_grid else ()  # a module may be given tokens that are not the grid's
        self.take(module, Tensors(q, k, v, key_mask), (text_start, text_stop), grid, scale, is_causal)
        mask = None if key_mask is None else key_mask[:, None, None]
        grouped = q.shape[1] != k.shape[1]
        out = scaled_dot_product_attention(
            q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=grouped
        )
        nothing = torch.empty(0, device=q.device)
        return Result(out, nothing, nothing.int())


def draw_observed(
    pipe: DiffusionPipeline,
    call: dict[str, Any],
    prompt: str,
    seed: int,
    on_step: Callable[[int, int], None],
    observer: StepObserver,
    stops_at_once: bool = False,
) -> int:
    """Draw one prompt down to its latents, and return the number of steps.

    observer: is told of each denoising step before it begins. on_step: is called after each, with steps done, in all.
    """

    def step_ended(pipe, step: int, timestep, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        observer.step_begins(step + 1)
        pipe._interrupt = stops_at_once  # Diffusers leaves out the steps to come
        on_step(step + 1, pipe.num_timesteps)
        return tensors

    observer.step_begins(0)
    pipe(
        prompt=prompt, generator=torch.Generator("cpu").manual_seed(seed), output_type="latent",
        callback_on_step_end=step_ended, callback_on_step_end_tensor_inputs=["latents"], **call,
    )  # fmt: skip
    return pipe.num_timesteps


def _chosen_modules(modules: Sequence[int | str] | None, available: list[str]) -> list[str]:
    """Return the names, in module order; raises ValueError for a module that is not there."""
    if modules is None:
        return available
    chosen = set()
    for asked in modules:
        if isinstance(asked, int) and -len(available) <= asked < len(available):
            chosen.add(available[asked])
        elif asked in available:
            chosen.add(asked)
        else:
            raise ValueError(
                f"there is no module {asked!r}: give 0 to {len(available) - 1}, or {available[0]} …"
            )
    return [name for name in available if name in chosen]


def _chosen_steps(steps: int | Sequence[int], total: int) -> list[int]:
    """Return the chosen ones of `total` steps; raises ValueError for one that is not there."""
    if isinstance(steps, int):
        if steps < 1:
            raise ValueError(f"steps must be 1 or more, got {steps}")
        last = total - 1
        return sorted({round(i * last / max(steps - 1, 1)) for i in range(steps)})
    if not steps or not all(0 <= step < total for step in steps):
        raise ValueError(f"steps must be among 0 to {total - 1}, got {list(steps)}")
    return sorted(set(steps))


def _resumed(folder: Path, settings: dict[str, Any]) -> Recordings:
    """Return the recordings there that have all their files; raises ValueError for recordings of other settings."""
    if not (folder / INDEX).exists():
        folder.mkdir(parents=True, exist_ok=True)
        return Recordings(folder, settings)
    stored = read_recordings(folder)
    if differing := [name for name in settings if stored.settings.get(name) != settings[name]]:
        raise ValueError(
            f"{folder} has recordings of different {', '.join(differing)}: choose another folder, or delete it"
        )
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
    damaged = {recording.prompt for recording in stored if sizes.get(recording.file) != recording.bytes}
    stored.recordings = [recording for recording in stored if recording.prompt not in damaged]
    return stored


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB" if math.log10(max(size, 1)) >= 7 else f"{size / 1e6:.3g} MB"
