"""Calibration: the search against enumeration, costs against hand counts, and policies that keep their promises."""

import itertools
import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dma_diffusers import DMAConfig, apply, report, restore
from dma_diffusers.eval.cost import tile_clocks
from dma_diffusers.eval.recordings import cost
from dma_diffusers.eval.recordings.calibrate import calibrate
from dma_diffusers.eval.recordings.configuration import AS_CHOSEN, configuration, of_modules
from dma_diffusers.eval.recordings.measure import at_noise_of, measure
from dma_diffusers.eval.recordings.options import EVERY_KEY, Range, joined, policies, ranges
from dma_diffusers.eval.recordings.policy import LADDER_HEADER, MODULES_HEADER, ladder, modules
from dma_diffusers.eval.recordings.record import record
from dma_diffusers.eval.recordings.search import Search, Selection
from dma_diffusers.eval.recordings.store import Recordings, Tensors
from dma_diffusers.kernels.tiling.policies import Dense, Diagonal, Neighborhood
from dma_diffusers.kernels.tiling.precision_map import Class
from dma_diffusers.pipelines.generate import draw
from dma_diffusers.pipelines.load import load_pipeline, recommended_call
from tests import tiny_pipelines
from tests.command_line import run
from tests.eval.recordings.folders import random_tensors, saved
from tests.kernels.calls import Call
from tests.kernels.oracle import is_high
from tests.pipelines.saved_flux import save_flux
from tests.tiny_pipelines import CALLS

CHEAPEST = "importance(budget=0.0, low=0.1, beyond=skip)"
FORMATS, MODULES, RANGES, HEADS = 2, 2, 2, 2
GROUPS = (2, 1)  # two windows of a diagonal, and a policy that all heads of a module have


def tables(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Errors and costs of options, `[formats, options, modules, ranges, heads]`: the later, the dearer and better."""
    generator = np.random.default_rng(seed)
    shape = (FORMATS, sum(GROUPS), MODULES, RANGES, HEADS)
    return -np.sort(-generator.random(shape), axis=1) / 10, np.sort(generator.random(shape), axis=1) / 10


def every_choice(errors: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """(error, cost) of every choice there is."""
    of_range = [*itertools.product(range(GROUPS[0]), repeat=HEADS), (GROUPS[0],) * HEADS]
    of_modules = []
    for module in range(MODULES):
        found = []
        for formats in range(FORMATS):
            for options in itertools.product(of_range, repeat=RANGES):
                places = [
                    (formats, options[level][head], module, level, head)
                    for level in range(RANGES)
                    for head in range(HEADS)
                ]
                found.append([sum(values[place] for place in places) for values in (errors, costs)])
        of_modules.append(np.array(found))
    return (of_modules[0][:, None] + of_modules[1]).reshape(-1, 2)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_no_choice_is_better_than_what_the_search_finds(seed):
    errors, costs = tables(seed)
    search, choices = Search(errors, costs, GROUPS), every_choice(errors, costs)
    assert search.least == pytest.approx(choices[:, 0].min())
    cheapest = choices[choices[:, 1] <= choices[:, 1].min() + 1e-12]
    assert search.most == pytest.approx(cheapest[:, 0].min())
    found = []
    for budget in np.geomspace(search.most, search.least, 30):
        choice = search.within(budget * (1 + 1e-9))
        error, price = search.error(choice), search.cost(choice)
        assert (
            np.abs(choices - [error, price]).sum(1).min() < 1e-9
        )  # heads keep to one group, modules to their formats
        assert error <= budget * (1 + 1e-9)
        dominates = (choices < np.array([error, price]) - 1e-12).all(1)
        assert not dominates.any()
        found.append((error, price))
    errors, prices = np.array(found).T
    assert (np.diff(errors) <= 1e-12).all() and (np.diff(prices) >= -1e-12).all()
    assert len(set(prices)) > 4


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

    options = {
        f"{low} {option}": DMAConfig(policy=option, low=low, **AS_CHOSEN)
        for group in policies(recordings)
        for option in group
        for low in ("mxfp4", "nvfp4")
    }
    found = measure(recordings, options, "cpu")
    errors = {name: float(np.sqrt((values.of_modules**2).mean())) for name, values in found.items()}
    costs = {name: cost_of(config) for name, config in options.items()}
    assert cheapest.cost == pytest.approx(min(costs.values()))
    assert (
        cheapest.relative_l2
        <= min(errors[name] for name in costs if costs[name] < cheapest.cost + 1e-9) * 1.001
    )
    assert cheapest.cost < cost_of(DMAConfig(window=0, sink=0)) - 0.1  # which leaves nothing out
    assert best.relative_l2 <= min(errors.values()) * 1.001
    assert best.cost <= cost_of(DMAConfig(window=EVERY_KEY)) + 1e-9
    for name in options:  # no uniform choice is cheaper and more precise than one on the ladder
        price, error = costs[name] + 1e-9, errors[name] + 1e-9
        assert not any(price < c.cost and error < c.relative_l2 for c in policy.choices)


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
    scheduled = 0
    for name, receipt in receipts.items():
        own = config.of_module(name)
        assert receipt.intercepted == 4 and (receipt.high, receipt.low) == (own.high, own.low)
        assert receipt.policy == (own.schedule or own.words)
        if own.schedule:
            scheduled += 1
            assert list(receipt.by_entry.values()) == [2, 2]
    assert scheduled  # or this test shows nothing


def test_noisy_steps_are_dense_where_only_they_err(tmp_path):
    torch.manual_seed(0)
    calls = []
    for step in (0, 1):
        tensors = random_tensors(step, 800, head_dim=64)
        q, k = (x[:, :, torch.randperm(800)] for x in tensors[:2])  # near tokens are no nearer than others
        v = tensors.v if step == 0 else 1 + tensors.v / 100  # hardly any error, whatever the scores
        calls.append(({"step": step, "sigma": 1.0 - step / 2}, tensors._replace(q=q, k=k, v=v)))
    recordings = saved(tmp_path, calls, ("attn",))
    policy = calibrate(recordings, 0.92, target="sm_100", device="cpu", formats=[("mxfp8", "mxfp4")])
    assert dict(policy.choices[0].config.modules)["attn"] == (("policy", CHEAPEST),)
    assert dict(policy.chosen.config.modules)["attn"] == (("schedule", f"sigma>0.75: {Dense()}; {CHEAPEST}"),)
    noisy, rest = policy.chosen.entries
    assert (noisy.above, rest.above) == (0.75, 0) and noisy.pairs == [2 * 49, 0, 0, 0]
    assert rest.pairs == [2 * 7, 2 * 7, 0, 2 * 35]  # the last tile of keys is not full, so that it is HIGH
    assert noisy.relative_l2 > 10 * rest.relative_l2
    assert all(choice.relative_l2 <= choice.budget * 1.001 for choice in policy.choices)


def test_a_model_without_text(tmp_path):
    pipe = tiny_pipelines.wan()
    recorded = record(pipe, ["a cat"], tmp_path, {"num_inference_steps": 2} | CALLS[type(pipe)], steps=1)
    policy = calibrate(recorded, 0.5, target="sm_90", device="cpu")
    assert all(choice.relative_l2 <= choice.budget * 1.001 for choice in policy.choices)
    assert (np.diff([choice.cost for choice in policy.choices]) >= -1e-9).all()
    assert {choice.config.high for choice in policy.choices} == {"bf16"}
    assert any(policy.choices[0].shares[Class.LOW :])


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_configurations_say_what_was_found(narrow_and_wide, data):
    """Every head has its option, and every module its formats, at each recorded noise level, written and read again."""
    groups, levels = policies(narrow_and_wide), ranges(narrow_and_wide)
    options = [policy for group in groups for policy in group]
    first, pairs = np.cumsum([0, *map(len, groups)]), [("mxfp8", "mxfp4"), ("mxfp8", "nvfp4")]

    def heads(group: int) -> list[int]:
        return data.draw(st.lists(st.integers(first[group], first[group + 1] - 1), min_size=4, max_size=4))

    drawn = st.sampled_from([0, 1, *range(len(groups))])
    found = Selection(
        np.array(data.draw(st.lists(st.integers(0, 1), min_size=2, max_size=2))),
        np.array([[heads(data.draw(drawn)) for _ in levels] for _ in range(2)]),
        np.array([], dtype=np.int64),
    )
    written = configuration(narrow_and_wide, of_modules(narrow_and_wide, found, pairs, options, levels))
    assert DMAConfig(**json.loads(json.dumps(asdict(written)))) == written
    for recording in narrow_and_wide:
        module, count = "ab".index(recording.module), recording.shape[1]
        level = next(i for i, level in enumerate(levels) if recording.step in level.steps)
        own = at_noise_of(narrow_and_wide, recording, written)
        asked = [options[number] for number in found.option[module, level][:count]]
        assert own.asked == joined(asked)
        if own.asked != Dense():
            assert (own.high, own.low) == pairs[found.formats[module]]
        if isinstance(own.asked, Diagonal) and own.asked.heads:
            widths = [EVERY_KEY if policy == Dense() else policy.window for policy in asked]
            assert list(own.asked.windows) == widths


@pytest.fixture(scope="module")
def narrow_and_wide(tmp_path_factory):
    """Modules of two and four heads, at six noise levels."""
    on_grid = {"grid": (20, 30)}
    calls = [
        (on_grid | {"module": name, "step": step, "sigma": 0.9 - step / 10}, random_tensors(0, 600, heads=heads))
        for step in range(6)
        for name, heads in (("a", 2), ("b", 4))
    ]  # fmt: skip
    return saved(tmp_path_factory.mktemp("recordings"), calls, ("a", "b"))


def test_ranges_hold_all_steps_and_a_schedule_can_have_them(narrow_and_wide):
    assert [level.steps for level in ranges(narrow_and_wide)] == [(0, 1), (2, 3), (4,), (5,)]
    assert [level.above for level in ranges(narrow_and_wide)] == [0.75, 0.55, 0.45, 0]


def test_one_range_where_noise_levels_are_not_known(tmp_path):
    calls = [({"step": step, "sigma": None}, random_tensors(0, 200)) for step in (0, 1)]
    assert ranges(saved(tmp_path, calls, ("a",))) == [Range(0.0, (0, 1))]


def test_neighbourhoods_need_one_grid(narrow_and_wide, tmp_path):
    def windows(recordings) -> set:
        return {option.window for (option, *_) in policies(recordings) if isinstance(option, Neighborhood)}

    assert windows(narrow_and_wide) == {(5, 8), (10, 15)}
    for name, fields in (("none", ({}, {})), ("causal", ({"grid": (20, 30), "is_causal": True},) * 2),
                         ("several", ({"grid": (20, 30)}, {"grid": (30, 20), "step": 1}))):  # fmt: skip
        calls = [(of_call, random_tensors(0, 600)) for of_call in fields]
        assert not windows(saved(tmp_path / name, calls, ("a",)))


def far_tokens(seed: int, smooth: bool) -> Tensors:
    """1,280 tokens whose far keys are alike in sub-tiles and weigh as much as near ones, or weigh nothing."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 1, 1280, 64, generator=generator) for _ in range(3))
    if smooth:
        k, v = (x[:, :, ::32].repeat_interleave(32, 2) for x in (k, v))
    else:
        tile = torch.nn.functional.one_hot(torch.arange(1280) // 128, 64)
        q, k = q / 4 + 16 * tile, k / 4 + 16 * tile
    return Tensors(q, k, v, None)


def test_means_where_far_keys_are_alike_and_none_where_they_weigh_nothing(tmp_path):
    calls = [
        ({"module": name, "prompt": prompt}, far_tokens(prompt, name == "smooth"))
        for prompt in range(2)
        for name in ("smooth", "local")
    ]
    recordings = saved(tmp_path, calls, ("smooth", "local"))
    policy = calibrate(recordings, 0.25, target="sm_90", device="cpu", formats=[("bf16", "int8")])
    smooth, local = policy.chosen.entries
    assert smooth.pairs[Class.MEAN] > 70 and smooth.pairs[Class.SKIP] == 0
    assert local.pairs[Class.SKIP] > 70 and local.pairs[Class.MEAN] == 0
    assert sum(smooth.pairs) == sum(local.pairs) == 100
    assert max(smooth.relative_l2, local.relative_l2) < 0.1 and policy.chosen.cost < 0.3
    assert error_of(recordings, policy.chosen.config) == pytest.approx(policy.chosen.relative_l2, rel=1e-6)


@pytest.fixture
def prompts_of_two_kinds(tmp_path):
    """A function that makes recordings of so many prompts, every fourth of them by other seeds."""

    def make(count: int, seed: int) -> Recordings:
        calls = [
            ({"prompt": prompt}, random_tensors(prompt + seed * (prompt % 4 == 3), 600))
            for prompt in range(count)
        ]
        return saved(tmp_path / f"{count} {seed}", calls, ("a",))

    return make


def test_every_fourth_prompt_is_held_out(prompts_of_two_kinds):
    """Other held-out prompts change what is measured on them, and nothing that is chosen."""
    found = [prompts_of_two_kinds(9, seed) for seed in (0, 100)]
    policies = [calibrate(each, 0.5, target="sm_90", device="cpu") for each in found]
    assert policies[0].evidence["prompts_held_out"] == [3, 7]
    for one, other in zip(*(policy.choices for policy in policies), strict=True):
        assert (one.config, one.relative_l2, one.cost) == (other.config, other.relative_l2, other.cost)
        assert one.held_out != other.held_out
        values = measure(found[1], {"it": other.config}, "cpu")["it"].of_modules[:, 0, 0]
        assert other.held_out == pytest.approx(np.sqrt((values[[3, 7]] ** 2).mean()), rel=1e-6)
        assert other.relative_l2 == pytest.approx(np.sqrt((np.delete(values, [3, 7]) ** 2).mean()), rel=1e-6)
    assert ladder(policies[0])[0][2] == f"{policies[0].choices[0].held_out:.4f}"


def test_few_prompts_are_all_chosen_by(prompts_of_two_kinds):
    policy = calibrate(prompts_of_two_kinds(3, 0), 0.5, target="sm_90", device="cpu")
    assert policy.evidence["prompts_held_out"] == []
    assert {choice.held_out for choice in policy.choices} == {None}
    assert {row[2] for row in ladder(policy)} == {"–"}


def test_progress_has_a_title_for_options_and_one_for_choices(prompts_of_two_kinds):
    told = []
    calibrate(
        prompts_of_two_kinds(4, 0), 0.5, target="sm_90", device="cpu", on_step=lambda *step: told.append(step)
    )
    assert told[:3] == [("measuring options", done, 3) for done in (1, 2, 3)]
    assert told[3:7] == [("measuring choices", done, 4) for done in (1, 2, 3, 4)]


def test_tables(policy):
    rows = ladder(policy)
    assert [row[0] for row in rows] == ["0", "0.25", "0.5", "0.6 (asked for)", "0.75", "1"]
    assert {len(row) for row in rows} == {len(LADDER_HEADER)}
    per_module = modules(policy)
    assert list(dict.fromkeys(row[0] for row in per_module)) == list(policy.chosen.of_modules)
    assert {row[1] for row in per_module} == {"over 0.88", "rest"}
    assert {len(row) for row in per_module} == {len(MODULES_HEADER)}


@pytest.mark.parametrize(("arguments", "words"), [
    ({"quality": 1.5}, "quality must be a number from 0 .* got 1.5"),
    ({"quality": float("nan")}, "quality must be a number from 0"),
    ({"target": "sm_75"}, "unknown target 'sm_75'; there are sm_90"),
    ({"formats": [("mxfp8", "int8/int8")]}, r"mxfp8\|int8/int8 has no kernel on sm_100"),
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
    arguments += ["--count", "2", "--recorded", "1", "--quality", "0.5"]
    arguments += ["--formats", "mxfp8|mxfp4", "--rotation", "head_dim"]
    code, output, error = run(monkeypatch, capsys, *arguments)
    assert code == 0, error
    assert "0.5 (asked for)" in output and "single_transformer_blocks.0.attn" in output
    assert "note: 1 repeated prompts were left out" in output
    assert "note: no prompt is held out, because 2 were recorded" in output
    assert "costs are predicted, errors are measured" in output
    assert list(tmp_path.iterdir()) == [target]
    document = json.loads(target.read_text())
    assert document["evidence"]["prompts"] == ["a cat", "two dogs"] and document["evidence"]["steps"] == [0]
    config = DMAConfig.from_file(target, quality=0.7)
    assert (config.model, config.rotation) == ("FluxTransformer2DModel", "head_dim")


@pytest.mark.parametrize(("options", "words"), [
    (["--quality", "2"], "quality must be a number from 0"),
    (["--target", "gpu"], "unknown target 'gpu'"),
    (["--formats", "mxfp8"], "give HIGH|LOW"),
    (["--rotation", "hadamard8"], "unknown rotation 'hadamard8'"),
    (["--rotation", "none", "--study", "study.json"], "leave --formats and --rotation out"),
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
