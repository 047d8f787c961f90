"""Calibration: the search against enumeration, costs against hand counts, and policies that keep their promises."""

import itertools
import json

import numpy as np
import pytest
import torch

from dma_diffusers import DMAConfig, apply, report, restore
from dma_diffusers.eval.cost import tile_clocks
from dma_diffusers.eval.recordings import cost
from dma_diffusers.eval.recordings.calibrate import calibrate
from dma_diffusers.eval.recordings.measure import measure
from dma_diffusers.eval.recordings.policy import EVERY_KEY, LADDER_HEADER, MODULES_HEADER, ladder, modules
from dma_diffusers.eval.recordings.record import record
from dma_diffusers.eval.recordings.search import Search
from dma_diffusers.pipelines.generate import draw
from dma_diffusers.pipelines.load import load_pipeline, recommended_call
from tests import tiny_pipelines
from tests.command_line import run
from tests.eval.recordings.folders import random_tensors, saved
from tests.kernels.calls import Call
from tests.kernels.oracle import is_high
from tests.pipelines.saved_flux import save_flux
from tests.tiny_pipelines import CALLS

OPTIONS, WINDOWS, MODULES, HEADS = 2, 3, 2, 2


def tables(seed: int):
    """Two levels of options whose wider windows err less and cost more."""
    generator = np.random.default_rng(seed)
    shape = (OPTIONS, WINDOWS, MODULES, HEADS)
    return [
        (-np.sort(-generator.random(shape), axis=1) / 10, np.sort(generator.random(shape), axis=1) / 10)
        for _ in range(2)
    ]


def every_choice(levels) -> np.ndarray:
    """(error, cost) of every choice there is."""
    found = []
    for errors, costs in levels:
        for option in itertools.product(range(OPTIONS), repeat=MODULES):
            for window in itertools.product(range(WINDOWS), repeat=MODULES * HEADS):
                places = [
                    (option[m], window[m * HEADS + h], m, h) for m in range(MODULES) for h in range(HEADS)
                ]
                found.append((sum(errors[place] for place in places), sum(costs[place] for place in places)))
    return np.array(found)


@pytest.mark.parametrize("seed", range(4))
def test_no_choice_is_better_than_what_the_search_finds(seed):
    levels = tables(seed)
    search, choices = Search(levels), every_choice(levels)
    assert search.least == pytest.approx(choices[:, 0].min())
    cheapest = choices[choices[:, 1] <= choices[:, 1].min() + 1e-12]
    assert search.most == pytest.approx(cheapest[:, 0].min())
    found = []
    for budget in np.geomspace(search.most, search.least, 30):
        choice = search.within(budget * (1 + 1e-9))
        error, price = search.error(choice), search.cost(choice)
        assert error <= budget * (1 + 1e-9)
        dominates = (choices < np.array([error, price]) - 1e-12).all(1)
        assert not dominates.any()
        found.append((error, price))
    errors, prices = np.array(found).T
    assert (np.diff(errors) <= 1e-12).all() and (np.diff(prices) >= -1e-12).all() and len(set(prices)) > 4


@pytest.mark.parametrize(("target", "head_dim", "formats", "clocks"), [
    ("sm_90", 128, ("bf16", "int8"), (2048 + 1024, 1024 + 1024)),
    ("sm_90", 64, ("bf16", "int8"), (1024 + 1024, 512 + 1024)),
    ("sm_90", 128, ("int8/bf16", "bf16/fp8"), (512 + 1024 + 1024, 1024 + 512 + 1024)),
    ("sm_100", 128, ("mxfp8", "mxfp4"), (256 + 512 + 1024, 128 + 256 + 1024)),
    ("sm_103", 128, ("bf16", "nvfp4"), (1024 + 512, 85 + 1 / 3 + 256 + 512)),
])  # fmt: skip
def test_clocks_of_a_tile(target, head_dim, formats, clocks):
    assert tile_clocks(target, head_dim, *formats) == pytest.approx(clocks)


@pytest.mark.parametrize("is_causal", [False, True])
def test_clocks_of_heads_are_counted(is_causal, tmp_path):
    fields = {"text": (0, 20), "is_causal": is_causal}
    recordings = saved(tmp_path, [(fields, random_tensors(0, 600, batch=3, head_dim=64))], ("attn",))
    config = DMAConfig(window=(0, 384), sink=0)
    clocks = cost.head_clocks(recordings, config, "sm_100")[0, 0]
    whole = 0.0
    for head, window in enumerate(config.window):
        call = Call(600, 600, 64, window=window, sink=0, text=(0, 20), is_causal=is_causal)
        high, total = is_high(call), 0.0
        for i in range(5):
            for j in range(5):
                if not is_causal or j <= i:
                    total += 128 + 256 + 1024 if high[i * 128, j * 128] else 64 + 128 + 1024
                    whole += (2 * 64 * 2 / 8192 + 1 / 16) * 128 * 128
        assert clocks[head] == pytest.approx(3 * total)
    assert cost.full_precision_clocks(recordings, "sm_100") == pytest.approx(3 * whole)


@pytest.fixture(scope="module")
def demo():
    return load_pipeline(), recommended_call() | {"num_inference_steps": 2, "height": 128, "width": 128}


@pytest.fixture(scope="module")
def recordings(demo, tmp_path_factory):
    pipe, call = demo
    folder = tmp_path_factory.mktemp("recordings")
    return record(pipe, ["a red apple left of a cat"], folder, call, steps=2, modules=[0, 1, -1])


@pytest.fixture(scope="module")
def policy(recordings):
    return calibrate(recordings, 0.6, target="sm_100", device="cpu")


def error_of(recordings, config) -> float:
    """Root mean square over steps and modules of the relative L2 of one recorded prompt."""
    of_modules = measure(recordings, {"it": config}, "cpu")["it"].of_modules
    return float(np.sqrt((of_modules**2).mean()))


def test_policies_keep_to_their_budgets(policy, recordings):
    assert [choice.quality for choice in policy.choices] == [0, 0.25, 0.5, 0.6, 0.75, 1]
    budgets = np.array([choice.budget for choice in policy.choices])
    qualities = np.array([choice.quality for choice in policy.choices])
    np.testing.assert_allclose(np.log(budgets), np.interp(qualities, [0, 1], np.log(budgets[[0, -1]])))
    for choice in policy.choices:
        assert choice.relative_l2 <= choice.budget * 1.001
        assert error_of(recordings, choice.config) == pytest.approx(choice.relative_l2, rel=1e-6)


def test_more_quality_never_costs_less_nor_errs_more(policy):
    errors, costs, recalls = (
        np.array([getattr(choice, name) for choice in policy.choices])
        for name in ("relative_l2", "cost", "recall")
    )
    assert (np.diff(errors) <= 1e-9).all() and (np.diff(costs) >= -1e-9).all()
    assert errors[0] > 1.5 * errors[-1] and costs[0] < costs[-1] and recalls[0] < recalls[-1]


def test_the_ends_are_the_cheapest_and_the_most_precise(policy, recordings):
    cheapest, best = policy.choices[0], policy.choices[-1]
    whole = cost.full_precision_clocks(recordings, "sm_100")

    def cost_of(config):
        return cost.head_clocks(recordings, config, "sm_100").mean(1).sum() / whole

    assert cheapest.cost == pytest.approx(cost_of(DMAConfig(window=0, sink=0)))
    assert cheapest.relative_l2 <= error_of(recordings, DMAConfig(window=0, sink=0, low="mxfp4"))
    assert best.relative_l2 <= error_of(recordings, DMAConfig(window=EVERY_KEY)) * 1.001
    assert best.cost <= cost_of(DMAConfig(window=EVERY_KEY)) + 1e-9
    uniform = [DMAConfig(window=w, sink=s, low="nvfp4") for w in (0, 128) for s in (0, 128)]
    for config in uniform:  # no uniform choice is cheaper and more precise than one on the ladder
        error, price = error_of(recordings, config), cost_of(config)
        assert not any(price < c.cost - 1e-9 and error < c.relative_l2 - 1e-9 for c in policy.choices)


def test_the_file_gives_back_what_was_chosen(policy, tmp_path):
    path = tmp_path / "policy.json"
    policy.save(path)
    by_quality = {choice.quality: choice.config for choice in policy.choices}
    assert DMAConfig.from_file(path) == by_quality[0.6] == policy.chosen.config
    assert DMAConfig.from_file(path, quality=0.3) == by_quality[0.5]
    assert DMAConfig.from_file(path, quality=1, lowering="reference").lowering == "reference"
    assert hash(DMAConfig.from_file(path)) == hash(policy.chosen.config)
    assert policy.to_dict()["evidence"]["prompts"] == ["a red apple left of a cat"]


def test_a_policy_draws_and_receipts_say_with_what(policy, demo):
    pipe, call = demo
    config = policy.chosen.config
    exact = draw(pipe, ["a red apple"], [0], call).latents
    apply(pipe, config, min_length=0)
    try:
        drawn = draw(pipe, ["a red apple"], [0], call).latents
        receipts = {receipt.module.removeprefix("transformer."): receipt for receipt in report(pipe).modules}
    finally:
        restore(pipe)
    assert drawn.isfinite().all() and not drawn.equal(exact)
    assert set(receipts) == set(policy.model["modules"])
    per_head = 0
    for name, receipt in receipts.items():
        own = config.of_module(name)
        assert receipt.intercepted == 4 and (receipt.high, receipt.low) == (own.high, own.low)
        if isinstance(own.window, tuple):
            per_head += 1
            assert f"window={'/'.join(map(str, own.window))}," in receipt.policy
    assert per_head  # or this test shows nothing


def test_noisy_steps_are_dense_where_only_they_err(tmp_path):
    torch.manual_seed(0)
    calls = []
    for step in (0, 1):
        tensors = random_tensors(step, 800, head_dim=64)
        q, k = (x[:, :, torch.randperm(800)] for x in tensors[:2])  # near tokens are no nearer than others
        v = tensors.v if step == 0 else 1 + tensors.v / 100  # hardly any error, whatever the scores
        calls.append(({"step": step, "sigma": 1.0 - step / 2}, tensors._replace(q=q, k=k, v=v)))
    recordings = saved(tmp_path, calls, ("attn",))
    policy = calibrate(recordings, 0.5, target="sm_100", device="cpu", formats=[("mxfp8", "mxfp4")])
    assert policy.choices[0].config.dense_above_sigma is None
    assert policy.choices[-2].config.dense_above_sigma == 0.75
    assert all(choice.relative_l2 <= choice.budget * 1.001 for choice in policy.choices)


def test_a_model_without_text(tmp_path):
    pipe = tiny_pipelines.wan()
    recorded = record(pipe, ["a cat"], tmp_path, {"num_inference_steps": 2} | CALLS[type(pipe)], steps=1)
    policy = calibrate(recorded, 0.5, target="sm_90", device="cpu")
    assert all(choice.relative_l2 <= choice.budget * 1.001 for choice in policy.choices)
    assert (np.diff([choice.cost for choice in policy.choices]) >= -1e-9).all()
    assert {choice.config.high for choice in policy.choices} == {"bf16"}
    assert policy.choices[0].recall == 0


def test_modules_have_windows_for_their_own_heads(tmp_path):
    """The narrower module too, where others have more heads."""
    calls = [
        ({}, random_tensors(0, 600, heads=2)), ({"module": "b"}, random_tensors(1, 600, heads=4, kv_heads=4))
    ]  # fmt: skip
    recordings = saved(tmp_path, calls, ("a", "b"))
    policy = calibrate(recordings, 0.5, target="sm_100", device="cpu", formats=[("mxfp8", "mxfp4")])
    for module, heads in (("a", 2), ("b", 4)):
        windows = [choice.config.of_module(module).window for choice in policy.choices]
        assert {len(window) for window in windows if isinstance(window, tuple)} == {heads}


def test_tables(policy):
    rows = ladder(policy)
    assert [row[0] for row in rows] == ["0", "0.25", "0.5", "0.6 (asked for)", "0.75", "1"]
    assert {len(row) for row in rows} == {len(LADDER_HEADER)}
    per_module = modules(policy)
    assert [row[0] for row in per_module] == list(policy.chosen.of_modules)
    assert {len(row) for row in per_module} == {len(MODULES_HEADER)}


@pytest.mark.parametrize(("arguments", "words"), [
    ({"quality": 1.5}, "quality must be a number from 0 .* got 1.5"),
    ({"quality": float("nan")}, "quality must be a number from 0"),
    ({"target": "sm_75"}, "unknown target 'sm_75'; there are sm_90"),
    ({"formats": [("mxfp8", "mxint4")]}, r"mxfp8\|mxint4 has no kernel on sm_100"),
    ({"formats": [("mxfp8", "int3")]}, "unknown format 'int3'"),
])  # fmt: skip
def test_what_cannot_be_calibrated(recordings, arguments, words):
    with pytest.raises(ValueError, match=words) as error:
        calibrate(recordings, **{"quality": 0.5, "target": "sm_100"} | arguments)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_flux(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a cat\ntwo dogs\na house\na cat\n")
    return str(path)


def test_the_command(model, prompts, tmp_path, monkeypatch, capsys):
    target = tmp_path / "policy.json"
    arguments = ["calibrate", str(model), "--prompts", prompts, "-o", str(target), "--target", "sm_100"]
    arguments += ["--count", "2", "--recorded", "1", "--quality", "0.5", "--formats", "mxfp8|mxfp4"]
    code, output, error = run(monkeypatch, capsys, *arguments)
    assert code == 0, error
    assert "0.5 (asked for)" in output and "single_transformer_blocks.0.attn" in output
    assert "note: 1 repeated prompts were left out" in output
    assert "costs are predicted, errors are measured" in output
    assert list(tmp_path.iterdir()) == [target]
    document = json.loads(target.read_text())
    assert document["evidence"]["prompts"] == ["a cat", "two dogs"] and document["evidence"]["steps"] == [0]
    assert DMAConfig.from_file(target, quality=0.7).model == "FluxTransformer2DModel"


@pytest.mark.parametrize(("options", "words"), [
    (["--quality", "2"], "quality must be a number from 0"),
    (["--target", "gpu"], "unknown target 'gpu'"),
    (["--formats", "mxfp8"], "give HIGH|LOW"),
    (["--formats", "mxfp8|int3", "--recordings", "recordings"], "unknown format 'int3'"),
    (["--prompts", "absent.txt"], "absent.txt"),
    (["--limit", "0.001", "--size", "256"], "more than the limit of 1 MB"),
])  # fmt: skip
def test_the_command_refuses_in_one_line(model, prompts, tmp_path, monkeypatch, capsys, options, words):
    monkeypatch.chdir(tmp_path)
    target = tmp_path / "policy.json"
    arguments = [
        "calibrate",
        str(model),
        "--prompts",
        prompts,
        "-o",
        str(target),
        "--target",
        "sm_100",
        *options,
    ]
    code, _, error = run(monkeypatch, capsys, *arguments)
    assert code == 1 and words in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())
