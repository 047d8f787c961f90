"""A study's folder: full precision's calls on prompts to learn from and on held-out ones, and its held-out drawings."""

import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline

from dma_diffusers.eval.recovery.drawings import are_there, read_drawings, save_drawings
from dma_diffusers.eval.recovery.prompts import held_out_prompts, training_prompts
from dma_diffusers.pipelines.finetuning.objectives import Distillation
from dma_diffusers.pipelines.finetuning.request import begin
from dma_diffusers.pipelines.finetuning.store import CallStore, HeldCalls
from dma_diffusers.pipelines.finetuning.target import with_size
from dma_diffusers.pipelines.finetuning.teacher import store_teacher
from dma_diffusers.pipelines.finetuning.trainer import Settings
from dma_diffusers.pipelines.generate import draw
from dma_diffusers.pipelines.load import load_pipeline, named_model, recommended_call
from dma_diffusers.pipelines.placement import own_device
from dma_diffusers.progress import OnStep

_SEED_OF_HELD_OUT, _SEED_OF_TRAINING = 10_000, 100_000  # so far apart that no noise is in both
_TOGETHER = 256  # prompts that full precision draws at a time, down to their latents


@dataclass(frozen=True)
class Plan:
    """The settings that all rows of a study have in common.

    model: "demo" or "demo-video". prompts: to learn from, in whole drawings. held_out: prompts that are drawn and
    compared. judged: how many of these give the held-out loss. budgets: rising numbers of steps, for each of which a
    row is trained. batch, learning_rate, warmup, decay, ema: as of `Settings`; by default the rate falls from the end
    of the warm-up to the end, as straight to 0 as in arXiv 2502.15938. steps: of denoising; None for the model's own.
    early: further prompts to learn from, drawn for their first `early_steps` alone, when a drawing is little more than
    its prompt. compiled: whether the model's blocks train as `torch.compile` makes them; they draw as they are.
    """

    model: str = "demo"
    prompts: int = 2000
    held_out: int = 64
    judged: int = 16
    budgets: tuple[int, ...] = (100, 300, 1000)
    batch: int = 32
    learning_rate: float = 3e-4
    warmup: int = 50
    decay: float = 1.0
    ema: float = 0.99
    steps: int | None = None
    early: int = 0
    early_steps: int = 8
    compiled: bool = False

    def settings(self, seed: int) -> Settings:
        """Settings of the trainer. seed: of the order."""
        return Settings(
            self.batch,
            learning_rate=self.learning_rate,
            warmup=self.warmup,
            decay=self.decay,
            ema=self.ema,
            seed=seed,
        )


class Study:
    """A folder with a plan, which `prepare` fills and rows use."""

    def __init__(self, folder: Path):
        self.folder = folder
        path = folder / "plan.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} holds no study: python -m dma_diffusers.eval.recovery prepare {folder}"
            )
        stored = json.loads(path.read_bytes())
        self.plan = Plan(**stored | {"budgets": tuple(stored["budgets"])})
        self.prompts = training_prompts(self.plan.model, self.plan.prompts + self.plan.early)
        self.held_out = held_out_prompts(self.plan.model, self.plan.held_out)

    @classmethod
    def of(cls, folder: Path, plan: Plan) -> "Study":
        """Begin a study; raises ValueError where the folder has one with another plan."""
        folder.mkdir(parents=True, exist_ok=True)
        begin(folder, asdict(plan), "plan.json")
        return cls(folder)

    def pipeline(self) -> tuple[DiffusionPipeline, dict]:
        """Load the model, and return it with the arguments of its calls."""
        call = recommended_call(named_model(self.plan.model))
        if self.plan.steps:
            call["num_inference_steps"] = self.plan.steps
        pipe = load_pipeline(named_model(self.plan.model), calls=[call])
        return pipe, with_size(pipe, call)

    def prepare(self, on_step: OnStep) -> None:
        """Draw with full precision what is missing in the folder."""
        pipe, call = self.pipeline()
        stored = partial(store_teacher, pipe, pipe.transformer, batch=_TOGETHER, on_step=on_step)
        training = partial(stored, call=call, store=self._store("training"), seed=_SEED_OF_TRAINING)
        training(self.prompts[: self.plan.prompts])
        training(self.prompts, steps=self.plan.early_steps)  # the early ones, which alone are missing now
        stored(self.held_out[: self.plan.judged], call, self._store("held-out"), seed=_SEED_OF_HELD_OUT)
        if not are_there(self._exact, len(self.held_out)):
            save_drawings(self._exact, self.draw(pipe, call, on_step))

    @torch.compiler.set_stance("force_eager")  # as full precision
    def draw(self, pipe: DiffusionPipeline, call: dict, on_step: OnStep) -> np.ndarray:
        """Draw the held-out prompts: uint8 `[prompts, F, H, W, 3]`."""
        drawn, size = [], self.plan.batch
        for start in range(0, len(self.held_out), size):
            texts = self.held_out[start : start + size]
            seeds = [_SEED_OF_HELD_OUT + start + i for i in range(len(texts))]
            drawn.append(draw(pipe, texts, seeds, call).frames)
            on_step("drawing", start + len(texts), len(self.held_out))
        return np.concatenate(drawn)

    @property
    def exact(self) -> np.ndarray:
        """Full precision's drawings of the held-out prompts."""
        return self.drawings(self._exact)

    def drawings(self, folder: Path) -> np.ndarray:
        """Read drawings of the held-out prompts: uint8 `[prompts, F, H, W, 3]`."""
        height = recommended_call(named_model(self.plan.model))["height"]
        return read_drawings(folder, len(self.held_out), height)

    def training(self) -> Distillation:
        """Return what rows learn from; raises FileNotFoundError where drawings are missing, as `judged` does."""
        return self._distillation("training", len(self.prompts))

    def judged(self) -> Distillation:
        """Return what the held-out loss is measured on."""
        return self._distillation("held-out", self.plan.judged)

    def _distillation(self, name: str, samples: int) -> Distillation:
        store = self._store(name)
        if (missing := samples - len(store.stored())) > 0:
            raise FileNotFoundError(
                f"{self.folder / name} lacks {missing} of {samples} drawings: run `prepare` again, which draws them"
            )
        return Distillation(HeldCalls(store, samples, own_device()), samples)

    def _store(self, name: str) -> CallStore:
        return CallStore(self.folder / name)

    @property
    def _exact(self) -> Path:
        return self.folder / "full-precision"
