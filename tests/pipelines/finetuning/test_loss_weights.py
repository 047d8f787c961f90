"""A step weighs as much in the loss as its error does in the finished drawing."""

import numpy as np
import pytest
import torch

from dma_diffusers.pipelines.finetuning import loss_weights as module
from dma_diffusers.pipelines.finetuning.calls import Call, CallStore, Part
from dma_diffusers.pipelines.finetuning.loss_weights import loss_weights
from dma_diffusers.pipelines.finetuning.objectives import Distillation, velocity_loss
from dma_diffusers.pipelines.finetuning.target import with_size
from dma_diffusers.pipelines.finetuning.teacher import store_teacher
from tests import tiny_pipelines
from tests.tiny_pipelines import CALLS

PROMPTS, STEPS = ["a cat", "a dog", "an owl"], 8


def silent(title: str, done: int, total: int) -> None:
    pass


@pytest.fixture
def drawn(tmp_path):
    """A pipeline whose transformer is linear, v = .5 x + error, and its stored drawings; `error` is to be set."""
    pipe = tiny_pipelines.flux()
    pipe.transformer.error = lambda level: 0.0

    def forward(hidden_states, timestep, **others):
        return (0.5 * hidden_states + pipe.transformer.error(float(timestep[0])),)

    pipe.transformer.forward = forward
    call = with_size(pipe, {**CALLS[type(pipe)], "num_inference_steps": STEPS})
    store = CallStore(tmp_path / "calls")
    store_teacher(pipe, pipe.transformer, PROMPTS, call, store, seed=5, batch=2, on_step=silent)
    return pipe, call, Distillation(store, len(PROMPTS))


def weights_of(drawn, path, error):
    pipe, call, objective = drawn

    def full():
        pipe.transformer.error = lambda level: 0.0

    def low():
        pipe.transformer.error = error

    return loss_weights(path, pipe, pipe.transformer, PROMPTS, call, 5, 2, objective, low, full, silent)


def test_a_step_weighs_what_the_drawing_makes_of_its_error(drawn, tmp_path):
    found = weights_of(drawn, tmp_path / "w.json", lambda level: 0.01 + level)
    sigmas = drawn[0].scheduler.sigmas.double().numpy()
    steps, expected = -np.diff(sigmas), []
    for part in np.array_split(np.arange(STEPS), 6):
        error, losses = 0.0, 0.0
        for k in range(STEPS):
            own = 0.01 + sigmas[k] if k in part else 0.0
            error = error * (1 - 0.5 * steps[k]) - steps[k] * own  # x' = x − ds (x / 2 + own)
            losses += own**2
        expected += [error**2 / losses] * len(part)
    expected = np.maximum(np.array(expected) / np.mean(expected), module._LEAST)
    assert sorted(found, reverse=True) == pytest.approx(sigmas[:-1].tolist(), rel=1e-6)
    np.testing.assert_allclose(list(found.values()), expected / expected.mean(), rtol=1e-3)


def test_steps_that_low_precision_leaves_alone_weigh_one(drawn, tmp_path):
    found = weights_of(drawn, tmp_path / "w.json", lambda level: 0.0 if level > 0.9 else 1.0)
    alone = [weight for level, weight in found.items() if level > 0.9]
    assert (
        0 < len(alone) < STEPS
        and set(alone) == {max(alone)}
        and np.mean(list(found.values())) == pytest.approx(1)
    )
    assert set(weights_of(drawn, tmp_path / "none.json", lambda level: 0.0).values()) == {1.0}


def test_weights_are_measured_once(drawn, tmp_path, monkeypatch):
    found = weights_of(drawn, tmp_path / "w.json", lambda level: level)
    monkeypatch.setattr(module, "_finished", None)
    assert weights_of(drawn, tmp_path / "w.json", lambda level: level) == found


def test_the_loss_adds_up_as_weighed(tmp_path):
    outputs = torch.randn(3, 1, 6, generator=torch.Generator().manual_seed(0))
    store = CallStore(tmp_path)
    levels = (1.0, 0.5, 0.25)
    store.write(
        0,
        [
            Call({"hidden_states": torch.zeros(1, 6), "timestep": torch.tensor([level])}, frozenset(), output)
            for level, output in zip(levels, outputs, strict=True)
        ],
        [Part(0), Part(1), Part(2)],
    )
    objective = Distillation(store, 1, {1.0: 2.6, 0.5: 0.3, 0.25: 0.1})
    assert objective.levels == [1.0, 1.0, 1.0, 0.5, 0.25]
    batch = objective.batch(range(5), torch.device("cpu"), torch.Generator())
    errors = torch.tensor([1.0, 1.0, 1.0, 2.0, 3.0])[:, None]
    given = torch.cat([outputs[i] for i in (0, 0, 0, 1, 2)]) + errors
    loss = velocity_loss(lambda **_: (given,), batch)
    assert float(loss) * 5 == pytest.approx(2.6 * 1 + 0.3 * 4 + 0.1 * 9, rel=1e-5)
