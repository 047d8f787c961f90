"""The recovery study on a tiny model: rows are made once, judged on what they did not learn from, and summed up."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from functools import partial, partialmethod

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel, WanTransformer3DModel

from dma_diffusers import finetune
from dma_diffusers.eval.recovery import scores as scores_module
from dma_diffusers.eval.recovery import study as study_module
from dma_diffusers.eval.recovery import training as training_module
from dma_diffusers.eval.recovery.prompts import held_out_prompts, training_prompts
from dma_diffusers.eval.recovery.rows import GAPS, ORDER, ROWS
from dma_diffusers.eval.recovery.run import drawings_path, held_out_loss, result_path, result_paths, run
from dma_diffusers.eval.recovery.study import Plan, Study
from dma_diffusers.eval.recovery.summary import gap_closed, gap_lines, order, summarise, table
from dma_diffusers.eval.recovery.training import Training
from dma_diffusers.pipelines.finetuning.objectives import velocity_loss
from dma_diffusers.pipelines.finetuning.trainer import Trainer
from dma_diffusers.pipelines.load import DEMO_MODEL, VIDEO_DEMO_MODEL
from tests.pipelines.saved_flux import save_flux

PLAN = Plan(
    prompts=2, held_out=3, judged=1, budgets=(1, 3), batch=2, learning_rate=1e-4, warmup=0, decay=0,
    early=3, early_steps=1,
)  # fmt: skip


def silent(title: str, done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def patch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def study(tmp_path_factory, patch):
    """A study of the tiny FLUX pipeline, with the prompts of the demo."""
    folder = tmp_path_factory.mktemp("study")
    save_flux(folder / "model")
    patch.setattr(study_module, "named_model", lambda name: folder / "model")

    def missing(device):
        raise ModuleNotFoundError

    patch.setattr(scores_module, "AlignmentScorer", missing)
    made = Study.of(folder, PLAN)
    made.prepare(silent)
    for name in ORDER:
        run(made, name, 0, 0, silent)
    return made


def test_rows_are_judged_at_each_budget(study):
    free, trained = (
        json.loads(result_path(study, name).read_text())
        for name in ("QuEST linears", "QuEST linears, trained")
    )
    assert list(free["loss"]) == ["0"] and list(trained["loss"]) == ["0", "1", "3"]
    assert trained["loss"]["0"] == free["loss"]["0"] > trained["loss"]["3"] > 0
    exact = json.loads(result_path(study, "bf16, trained").read_text())
    assert exact["loss"]["0"] < 1e-12
    assert len(free["scores"]["psnr_db"]) == 3 and set(free["scores"]) == {"psnr_db", "lpips"}
    drawn = study.drawings(drawings_path(result_path(study, "QuEST linears")))
    assert drawn.shape == study.exact.shape == (3, 1, 48, 40, 3)
    error = np.square(drawn - study.exact.astype(float)).mean((1, 2, 3, 4))
    np.testing.assert_allclose(free["scores"]["psnr_db"], 10 * np.log10(255**2 / error), rtol=1e-4)


def test_further_prompts_are_drawn_for_their_first_steps(study):
    drawn = Counter(step.sample for step in study.training().steps)
    assert drawn == {0: 2, 1: 2, 2: 1, 3: 1, 4: 1} and len(study.prompts) == 5
    (first, second), early = study.training().levels[:2], study.training().levels[-3:]
    assert first > second and early == [first] * 3
    assert Counter(step.sample for step in study.judged().steps) == {0: 2}


def test_a_study_that_is_not_fully_drawn_says_so(study, tmp_path):
    begun = Study.of(tmp_path, PLAN)
    with pytest.raises(FileNotFoundError, match="training lacks 5 of 5 drawings: run `prepare` again"):
        begun.training()
    shutil.copytree(study.folder / "training", tmp_path / "training")
    assert len(begun.training().steps) == len(study.training().steps)
    with pytest.raises(FileNotFoundError, match="held-out lacks 1 of 1"):
        run(begun, "all MXFP4, trained", 0, 0, silent)


def test_no_noise_is_in_training_and_held_out(study, monkeypatch):
    seeds = []
    monkeypatch.setattr(study_module, "store_teacher", lambda *given, seed, **named: seeds.append(seed))
    study.prepare(silent)
    most = 20_000  # prompts of a study
    *training, held_out = seeds
    assert len(set(training)) == 1 and abs(training[0] - held_out) > most


def test_compiled_blocks_learn_the_same_and_draw_as_they_are(study, tmp_path, monkeypatch):
    graphs, aot = [], torch._dynamo.lookup_backend("aot_eager")

    def backend(graph, inputs):
        graphs.append(graph)
        return aot(graph, inputs)

    compile_blocks = FluxTransformer2DModel.compile_repeated_blocks
    monkeypatch.setattr(
        FluxTransformer2DModel, "compile_repeated_blocks", partialmethod(compile_blocks, backend=backend)
    )
    row, found = ROWS["demo"]["all MXFP4, trained"], []
    for compiled in (False, True):
        monkeypatch.setattr(study, "plan", replace(PLAN, compiled=compiled, budgets=(3,)))
        pipe, call = study.pipeline()
        finetune.prepare(pipe.transformer, attention=row.attention)
        judged = partial(held_out_loss, pipe.transformer, study.judged(), 2)
        training = Training(study, row, pipe.transformer, 0, tmp_path / str(compiled))
        assert not graphs
        batch = study.training().batch([0, 3], torch.device("cpu"), torch.Generator())
        velocity_loss(pipe.transformer.train(), batch).backward()
        gradients = torch.cat([value.grad.flatten() for value in pipe.transformer.parameters()])
        pipe.transformer.zero_grad()
        losses = training.run(0, judged, silent)["loss"]
        made = len(graphs)
        study.draw(pipe, call, silent)
        assert bool(made) is compiled and len(graphs) == made
        found.append((losses["3"], gradients))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-3)
    assert (found[0][1] - found[1][1]).norm() < 1e-5 * found[0][1].norm()


def test_a_row_that_is_there_is_not_made_again(study, monkeypatch):
    monkeypatch.setattr(Study, "pipeline", None)
    assert run(study, ORDER[0], 0, 0, silent) == result_path(study, ORDER[0])
    with pytest.raises(ValueError, match="there is no row 'all' of demo; there are all MXFP8"):
        run(study, "all", 0, 0, silent)


def test_a_study_keeps_its_plan(study):
    with pytest.raises(ValueError, match="batch was 2, now 5"):
        Study.of(study.folder, replace(PLAN, batch=5))
    assert Study(study.folder).plan == PLAN


def test_the_summary_has_order_and_gains(study):
    summary = summarise(study)
    assert summary["order"]["budget"] == 3 and list(summary["order"]["losses"]) == list(ORDER)
    assert summary["gaps"] == []
    gained = summary["rows"]["QuEST linears, trained"]["gained"]["psnr_db"]
    means = [
        summary["rows"][n]["means"]["psnr_db"]["estimate"]
        for n in ("QuEST linears, trained", "QuEST linears")
    ]
    assert gained["estimate"] == pytest.approx(means[0] - means[1])
    assert len(table(summary).splitlines()) == 2 + len(ORDER)


class Killed(Exception):
    pass


def test_a_row_that_was_killed_goes_on(study, monkeypatch):
    """Another seed's training is killed in its second budget; its time then ends the last training."""
    name, advance = "QuEST linears, trained", Trainer.advance
    made = []

    def counted(self):
        made.append((self.steps, self.step))
        if made.count((3, 1)) == 1 and made[-1] == (3, 1):
            raise Killed
        return advance(self)

    monkeypatch.setattr(Trainer, "advance", counted)
    monkeypatch.setattr(training_module, "_CHECKPOINT_SECONDS", 0)
    with pytest.raises(Killed):
        run(study, name, 1, 0.01, silent)
    assert not result_path(study, name, 1).exists()
    result = json.loads(run(study, name, 1, 0.01, silent).read_text())
    # The first budget and the step before are not made again.
    assert made[:5] == [(1, 0), (3, 0), (3, 1), (3, 1), (3, 2)] and made[5][1] == 0
    assert list(result["loss"]) == ["0", "1", "3", "end"] and result["steps"] == len(made) - 5
    assert not result_path(study, name, 1).with_suffix(".training").exists()
    seeds = [json.loads(path.read_text()) for path in result_paths(study, name)]
    assert [each["seed"] for each in seeds] == [0, 1]
    both = summarise(study)["rows"][name]
    assert both["seeds"] == [0, 1] and "end" not in both["loss"]
    assert both["loss"]["3"] == pytest.approx((seeds[0]["loss"]["3"] + seeds[1]["loss"]["3"]) / 2)
    assert both["scores"]["lpips"][2] == pytest.approx(sum(each["scores"]["lpips"][2] for each in seeds) / 2)


def test_the_gap_is_closed_in_percent_of_the_way():
    psnr = {"after": [38.0, 38.0, 36.0], "before": [30.0, 30.0, 28.0], "aim": [40.0, 40.0, 38.0]}
    results = {name: {"scores": {"psnr_db": values}} for name, values in psnr.items()}
    closed = gap_closed(results, "after", "before", "aim")
    assert closed["estimate"] == closed["low"] == closed["high"] == pytest.approx(80)


def test_the_summary_has_the_gaps_whose_rows_are_there(tmp_path):
    study = Study.of(tmp_path / "study", PLAN)
    names = {"all MXFP4": 30.0, "all MXFP8": 40.0, "all MXFP4, rotated": 33.0}
    for name, psnr in names.items():
        path = result_path(study, name)
        path.parent.mkdir(exist_ok=True)
        scores = {"psnr_db": [psnr, psnr + 1]}
        path.write_text(json.dumps({"seed": 0, "trains": False, "loss": {"0": 0.1}, "scores": scores}))
    summary = summarise(study)
    (gap,) = summary["gaps"]
    assert (gap["row"], gap["from"], gap["to"]) == ("all MXFP4, rotated", "all MXFP4", "all MXFP8")
    assert [gap["closed_percent"]["estimate"]] == gap["of_seeds"] == [pytest.approx(30)]
    assert gap_lines(summary) == ["all MXFP4, rotated: 30 [30, 30] % of the gap from all MXFP4 to all MXFP8"]


@pytest.mark.parametrize(("losses", "rises"), [((0.1, 0.2, 0.2, 0.4), True), ((0.1, 0.3, 0.2, 0.4), False)])
def test_the_order_is_that_of_losses_at_the_last_budget_that_all_reached(losses, rises):
    results = {
        name: {
            "trains": name != ORDER[-1],
            "loss": {"0": loss, "100": loss, **({"300": 9.0} if i == 0 else {})},
        }
        for i, (name, loss) in enumerate(zip(ORDER, losses, strict=True))
    }
    found = order(results)
    assert found["budget"] == 100 and found["rises"] is rises


@pytest.mark.parametrize("model", ROWS)
def test_prompts_to_learn_from_are_not_held_out(model):
    training = training_prompts(model, 150)
    assert len(set(training)) == 150 and not set(training) & set(held_out_prompts(model, 200))
    assert training == training_prompts(model, 150)


def test_more_prompts_than_there_are_are_refused():
    assert len(training_prompts("demo-video", 3600)) == 3600
    with pytest.raises(ValueError, match="demo-video has 3600 prompts to learn from, not 3601"):
        training_prompts("demo-video", 3601)


@pytest.mark.parametrize(("model", "kind", "folder"), [
    ("demo", FluxTransformer2DModel, DEMO_MODEL), ("demo-video", WanTransformer3DModel, VIDEO_DEMO_MODEL),
])  # fmt: skip
def test_the_model_can_have_every_row(model, kind, folder):
    with torch.device("meta"):
        transformer = kind.from_config(kind.load_config(folder, subfolder="transformer"))
    for row in ROWS[model].values():
        assert row.free is None or row.free in ROWS[model]
        if row.linears or row.attention:
            finetune.prepare(transformer, row.linears, row.attention, rounding=row.rounding)
            finetune.restore(transformer)
    assert {row for gap in GAPS[model] for row in gap} <= ROWS[model].keys()
