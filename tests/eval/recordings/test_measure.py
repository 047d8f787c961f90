"""Measurements on recordings agree with an explicit softmax in float64."""

import json
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from dma_diffusers import DMAConfig
from dma_diffusers.eval.classes import tile_classes
from dma_diffusers.eval.cost import tile_clocks
from dma_diffusers.eval.recordings import exact
from dma_diffusers.eval.recordings.cost import head_clocks, predicted_cost
from dma_diffusers.eval.recordings.evaluate import HEADER, evaluate_attention, table
from dma_diffusers.eval.recordings.measure import _arguments, layers, measure, to_json
from dma_diffusers.kernels import operator, plan
from dma_diffusers.kernels.tiling.layout import Layout
from dma_diffusers.kernels.tiling.policies import parse as parse_policy
from dma_diffusers.kernels.tiling.precision_map import Class, build_map
from dma_diffusers.kernels.tiling.tile_order import TileOrder
from tests import tiny_pipelines
from tests.eval.recordings.folders import random_tensors, saved
from tests.kernels.calls import Call
from tests.kernels.oracle import is_high
from tests.tiny_pipelines import CALLS

MODULES = ("blocks.0.attn", "blocks.1.attn", "blocks.2.attn")


def probabilities(tensors, scale=None, is_causal=False) -> torch.Tensor:
    """Softmax over all keys at once, float64 `[B, H, S, S]`."""
    q, k, _, mask = tensors
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1).double()
    scores = q.double() @ k.mT * (scale or q.shape[-1] ** -0.5)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -math.inf)
    if is_causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -math.inf)
    return scores.softmax(-1)


def output(tensors, **call) -> torch.Tensor:
    values = tensors.v.repeat_interleave(tensors.q.shape[1] // tensors.v.shape[1], 1).double()
    return probabilities(tensors, **call) @ values


@pytest.mark.parametrize("rows", [2**25, 1])
@pytest.mark.parametrize(("made", "call"), [
    ({"tokens": 300}, {}),
    ({"tokens": 256, "heads": 4, "kv_heads": 2, "batch": 2}, {"scale": 0.4}),
    ({"tokens": 300, "batch": 2, "masked": True}, {}),
    ({"tokens": 300}, {"is_causal": True}),
])  # fmt: skip
def test_exact_attention(made, call, rows, monkeypatch):
    monkeypatch.setattr(exact, "_SCORES", rows)
    tensors = random_tensors(0, **made)
    out, mass = exact.exact_attention(tensors, call.get("scale"), call.get("is_causal", False))
    torch.testing.assert_close(out, output(tensors, **call), rtol=1e-12, atol=1e-12)
    p = probabilities(tensors, **call)
    tiles = -(-made["tokens"] // 128)
    for i in range(tiles):
        for j in range(tiles):
            share = p[:, :, i * 128 : i * 128 + 128, j * 128 : j * 128 + 128].sum((-2, -1)) / made["tokens"]
            torch.testing.assert_close(mass[:, :, i, j], share, rtol=1e-9, atol=1e-12)


def test_queries_that_see_no_key_count_for_nothing():
    tensors = random_tensors(0, 200, batch=2)._replace(
        key_mask=torch.tensor([[True], [False]]).expand(2, 200)
    )
    out, mass = exact.exact_attention(tensors, None, False)
    assert not out[1].any() and not mass[1].any()
    torch.testing.assert_close(mass[0].sum((-2, -1)), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize(("fields", "windows"), [
    ({"window": 0, "sink": 0}, (0, 0)),
    ({"window": 128, "sink": 128}, (128, 128)),
    ({"window": (0, 384), "sink": 0}, (0, 384)),
    ({"window": 10_000}, (10_000, 10_000)),
])  # fmt: skip
@pytest.mark.parametrize("text", [(0, 0), (0, 77)])
def test_recall_is_the_probability_of_high_tokens(fields, windows, text, tmp_path):
    tensors = random_tensors(1, 600)
    recordings = saved(tmp_path, [({"text": text}, tensors)], MODULES)
    recall = measure(recordings, {"it": DMAConfig(**fields)}, "cpu")["it"].recall
    sink = fields.get("sink", 128)
    any_high = any(is_high(Call(600, 600, 32, window=w, sink=sink, text=text)).any() for w in windows)
    for head, window in enumerate(windows):
        high = is_high(Call(600, 600, 32, window=window, sink=sink, text=text))
        if any_high:
            high[:, 512:] = True  # the tile that the end of the keys cuts: HIGH in every head if any tile is
        share = (probabilities(tensors)[0, head] * high).sum() / 600
        assert recall[0, 0, 0, head] == pytest.approx(share.item(), abs=1e-12)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("policy", "skips"),
    [
        ("neighborhood(window=9x14, high=3x4)", True),
        ("neighborhood(high=3x4)", False),
        ("diagonal(near=grid)", False),
    ],
)
def test_recall_on_a_grid(policy, skips, masked, tmp_path):
    """The probability between the tokens of those pairs of boxes that the operator's plan has HIGH."""
    tensors, text, grid = random_tensors(1, 1320, batch=2, masked=masked), (1280, 1320), (40, 32)
    recordings = saved(tmp_path, [({"text": text, "grid": grid}, tensors)], MODULES)
    recall = measure(recordings, {"it": DMAConfig(policy=policy)}, "cpu")["it"].recall[0, 0, 0]
    places = TileOrder(Layout(1320, 1320, text, grid), parse_policy(policy).box(grid))
    made = plan.make(parse_policy(policy), Layout(1320, 1320, text, grid))
    p = probabilities(tensors)
    expected = torch.zeros(2, dtype=torch.float64)
    bounds, indices = made.precision_map.bounds[0, 0], made.precision_map.indices[0, 0]
    for q_tile, tokens in enumerate(places.token_order.view(-1, 128)):
        first, low, last = bounds[q_tile].tolist()  # ends of HIGH, LOW and MASKED, which is HIGH too
        for k_tile in [*indices[q_tile, :first].tolist(), *indices[q_tile, low:last].tolist()]:
            keys = places.token_order.view(-1, 128)[k_tile]
            expected += p[:, :, tokens[tokens >= 0]][..., keys[keys >= 0]].sum((0, 2, 3))
    np.testing.assert_allclose(recall, expected / 2640, rtol=1e-9)
    assert 0 < recall.max() < 1
    assert (bounds[:, -1] < len(bounds)).any() == skips


def test_errors_on_a_grid_are_those_of_the_operator(tmp_path):
    tensors = random_tensors(1, 640)
    recordings = saved(tmp_path, [({"text": (600, 640), "grid": (20, 30)}, tensors)], MODULES)
    policy = "neighborhood(window=9x14, high=3x4)"
    found = measure(recordings, {"it": DMAConfig(policy=policy)}, "cpu")["it"].of_modules
    q, k, v, _ = tensors
    out = operator.attention(
        q, k, v, policy=policy, grid=(20, 30), text_start=600, text_stop=640
    ).out.double()
    exact = scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert found[0, 0, 0] == pytest.approx(((out - exact).norm() / exact.norm()).item(), rel=1e-9)
    without = saved(tmp_path / "without", [({"text": (600, 640)}, tensors)], MODULES)
    with pytest.raises(
        ValueError, match=r"neighborhood\(.*\) needs the grid that the tokens lie on, and none was given"
    ):
        measure(without, {"it": DMAConfig(policy=policy)}, "cpu")


def test_a_grid_of_ones_own_is_followed(tmp_path):
    """A window in the sequence, of a model that knows its tokens to lie on a grid of two dimensions."""
    tensors = random_tensors(1, 640)
    recordings = saved(tmp_path, [({"grid": (20, 32)}, tensors)], MODULES)
    config = DMAConfig(policy="neighborhood(window=128, stride=128)", grid=(640,), high="bf16", low="int8")
    found = measure(recordings, {"it": config}, "cpu")["it"].of_modules
    q, k, v, _ = tensors
    exact = scaled_dot_product_attention(q.double(), k.double(), v.double())
    call = {"policy": config.policy, "grid": (640,), "high": "bf16", "low": "int8"}
    out = operator.attention(q, k, v, **call).out.double()
    assert found[0, 0, 0] == pytest.approx(((out - exact).norm() / exact.norm()).item(), rel=1e-9)
    np.testing.assert_allclose(
        head_clocks(recordings, config, "sm_90"), 5 * tile_clocks("sm_90", 32, "bf16", "int8")[1]
    )


def test_skipped_tiles_cost_nothing(tmp_path):
    """Each of 20 tiles in boxes of 8×16 visits itself alone."""
    recordings = saved(tmp_path, [({"grid": (40, 64)}, random_tensors(1, 2560))], MODULES)
    policy = {"policy": "neighborhood(window=8x16, stride=8x16)", "high": "bf16", "low": "int8"}
    clocks = head_clocks(recordings, DMAConfig(**policy), "sm_90")
    everywhere = DMAConfig(policy="dense(everywhere=low)", high="bf16", low="int8")
    np.testing.assert_allclose(clocks * 20, head_clocks(recordings, everywhere, "sm_90"))
    np.testing.assert_allclose(clocks, 20 * tile_clocks("sm_90", 32, "bf16", "int8")[1])


def test_tiles_taken_by_their_means_cost_one_tile_of_means(tmp_path):
    """Each of 20 Q tiles visits itself, and walks one tile of means for the 19 others."""
    recordings = saved(tmp_path, [({"grid": (40, 64)}, random_tensors(1, 2560))], MODULES)
    policy = {
        "policy": "neighborhood(window=8x16, stride=8x16, beyond=mean)",
        "high": "mxfp8",
        "low": "mxfp4",
    }
    clocks = head_clocks(recordings, DMAConfig(**policy), "sm_100")
    of_high, of_low = tile_clocks("sm_100", 32, "mxfp8", "mxfp4")
    np.testing.assert_allclose(clocks, 20 * (of_low + of_high))
    policy = "importance(budget=0.1, low=0.2, beyond=mean, by=pools)"  # finding the pairs is not counted
    routed = DMAConfig(policy=policy, high="mxfp8", low="mxfp4")
    clocks = head_clocks(recordings, routed, "sm_100")
    np.testing.assert_allclose(clocks, 20 * (2 * of_high + 4 * of_low + of_high))


def test_means_are_measured_as_the_operator_runs_them(tmp_path):
    tensors = random_tensors(1, 2560)
    recordings = saved(tmp_path, [({"grid": (40, 64)}, tensors)], MODULES)
    policies = {
        name: f"neighborhood(window=8x16, stride=8x16, beyond={name})" for name in ("mean", "skip")
    } | {"high": "neighborhood(window=8x16, stride=8x16, high=8x16, beyond=mean)"}
    configurations = {name: DMAConfig(policy=policy, min_length=0) for name, policy in policies.items()}
    found = measure(recordings, configurations, "cpu")
    error = {name: values.of_modules[0, 0, 0] for name, values in found.items()}
    assert error["high"] < error["mean"] < error["skip"]
    q, k, v, _ = tensors
    out = operator.attention(q, k, v, policy=policies["mean"], grid=(40, 64)).out.double()
    exact = scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert error["mean"] == pytest.approx(((out - exact).norm() / exact.norm()).item(), rel=1e-9)
    assert found["mean"].recall.max() == 0 < found["high"].recall.min() < 1


def test_errors_are_those_of_the_operator(tmp_path):
    first, second = random_tensors(1, 300), random_tensors(2, 300, batch=2)
    calls = [({"text": (0, 20)}, first), ({"text": (0, 20), "call": 1}, second)]
    recordings = saved(tmp_path, calls, MODULES)
    found = measure(recordings, {"it": DMAConfig(low="nvfp4", window=(0, 128), sink=0)}, "cpu")["it"]
    low_precision, expected = [], []
    for _, (q, k, v, _mask) in calls:
        out = operator.attention(
            q, k, v, low="nvfp4", policy="diagonal(window=0/128, sink=0)", text_stop=20
        ).out
        low_precision.append(out.transpose(0, 1).flatten(1).double())
        expected.append(
            scaled_dot_product_attention(q.double(), k.double(), v.double()).transpose(0, 1).flatten(1)
        )
    out, reference = torch.cat(low_precision, 1), torch.cat(expected, 1)
    error = (out - reference).norm(dim=1) / reference.norm(dim=1)
    np.testing.assert_allclose(found.relative_l2[0, 0, 0], error, rtol=1e-9)
    cosine = torch.nn.functional.cosine_similarity(out, reference, dim=1)
    np.testing.assert_allclose(found.cosine[0, 0, 0], cosine, rtol=1e-9)
    of_module = (out - reference).norm() / reference.norm()
    assert found.of_modules[0, 0, 0] == pytest.approx(of_module.item(), rel=1e-9)


def test_configurations_run_as_in_the_pipeline(tmp_path):
    """A module's own fields, dense layers, dense steps, and calls that are left to stock."""
    tensors = random_tensors(3, 300)
    places = [(module, step) for step in (0, 1) for module in MODULES]
    calls = [({"module": m, "step": s, "sigma": 1.0 - s / 2}, tensors) for m, s in places]
    recordings = saved(tmp_path, calls, MODULES)
    far = {"window": 0, "sink": 0}
    configurations = {
        "dense": DMAConfig(window=10_000),
        "low": DMAConfig(**far),
        "modules": DMAConfig(**far, modules={MODULES[1]: {"dense": True}, MODULES[2]: {"low": "nvfp4"}}),
        "nvfp4": DMAConfig(**far, low="nvfp4"),
        "layers": DMAConfig(**far, dense_layers=(-1,)),
        "steps": DMAConfig(**far, dense_above_sigma=0.7),
        "stock": DMAConfig.preset("exact"),
        "short": DMAConfig(min_length=301),
    }
    found = {
        name: values.of_modules[0] for name, values in measure(recordings, configurations, "cpu").items()
    }
    low, dense, other = found["low"][0, 0], found["dense"][0, 0], found["nvfp4"][0, 0]
    assert len({low, dense, other}) == 3 and dense < low / 3
    np.testing.assert_allclose(found["modules"], [[low] * 2, [dense] * 2, [other] * 2])
    np.testing.assert_allclose(found["layers"], [[low] * 2, [low] * 2, [dense] * 2])
    np.testing.assert_allclose(found["steps"], [[dense, low]] * 3)
    assert (found["stock"] < 1e-5).all() and (found["short"] < 1e-5).all()


@pytest.mark.parametrize(("kind", "fields", "is_stock"), [
    ("HunyuanVideoTransformer3DModel", {}, False),
    ("HunyuanVideoTransformer3DModel", {"protect_text": False}, True),
    ("WanTransformer3DModel", {}, True),
])  # fmt: skip
def test_masked_text_is_left_to_stock_where_the_pipeline_leaves_it(
    kind, fields, is_stock, tmp_path, monkeypatch
):
    tensors = random_tensors(3, 300, head_dim=128)
    tensors = tensors._replace(key_mask=(torch.arange(300) < 280)[None])
    recordings = saved(tmp_path, [({"text": (260, 300)}, tensors)], MODULES[:1], kind)
    monkeypatch.setattr("dma_diffusers.config.lowerings.architecture", lambda device: "sm_90")
    monkeypatch.setattr("dma_diffusers.gains.GAINS_FROM", {("sm_90", 128): 300})
    auto = DMAConfig(high="bf16", low="int8", lowering="fastest", **fields)
    arguments = _arguments(recordings, recordings.recordings[0], tensors, auto)
    assert (arguments is None) == is_stock


def test_a_familys_dense_steps_and_layers_are_measured_and_cost_what_they_cost(tmp_path):
    tensors = random_tensors(3, 512)
    places = [(module, step) for step in (0, 1) for module in MODULES]
    fields = {"grid": (2, 16, 16)}
    calls = [({"module": m, "step": s, "sigma": 1.0 - s / 2, **fields}, tensors) for m, s in places]
    recordings = saved(tmp_path, calls, MODULES, "WanTransformer3DModel")
    near = {"policy": "neighborhood(window=2x8x8, stride=2x8x8)", "min_length": 0}
    configurations = {
        "default": DMAConfig(**near),
        "asked for": DMAConfig(**near, dense_above_sigma=0.9, dense_layers=(0,)),
        "none": DMAConfig(**near, dense_above_sigma=1, dense_layers=()),
    }
    found = measure(recordings, configurations, "cpu")
    default, asked_for, none = (found[name].of_modules[0] for name in configurations)
    assert np.array_equal(default, asked_for)
    dense = np.array([[True, True], [True, False], [True, False]])  # the first module, and the first step
    assert (default[dense] < none[dense] / 3).all() and np.array_equal(default[~dense], none[~dense])
    costs = [predicted_cost(recordings, config, "sm_100") for config in configurations.values()]
    assert costs[0] == costs[1] > costs[2]


def test_each_step_is_measured_and_counted_under_its_entry_of_the_schedule(tmp_path):
    tensors = random_tensors(3, 512)
    places = [(module, step) for step in range(4) for module in MODULES]
    calls = [({"module": m, "step": s, "sigma": 1.0 - s / 4}, tensors) for m, s in places]
    recordings = saved(tmp_path, calls, MODULES, "WanTransformer3DModel")
    parts = [
        {"policy": "dense()"},
        {"policy": "importance(budget=0.3)", "low": "nvfp4"},
        {"policy": "dense(everywhere=low)"},
    ]
    alone = {str(number): DMAConfig(min_length=0, **part) for number, part in enumerate(parts)}
    schedule = [[above, part] for above, part in zip((0.8, 0.4, 0), parts, strict=True)]
    own = {
        MODULES[0]: {"schedule": "sigma>0.4: dense(everywhere=low); dense()"},
        MODULES[1]: {"policy": "dense()"},
    }
    configurations = {
        **alone, "all": DMAConfig(min_length=0, schedule=schedule),
        "own": DMAConfig(min_length=0, schedule=schedule, modules=own),
    }  # fmt: skip
    found = {
        name: values.of_modules[0] for name, values in measure(recordings, configurations, "cpu").items()
    }
    chosen = ["0", "1", "1", "2"]  # at 1, .75, .5 and .25
    np.testing.assert_array_equal(
        found["all"], np.stack([found[name][:, step] for step, name in enumerate(chosen)], 1)
    )
    np.testing.assert_array_equal(found["own"][0], [*found["2"][0, :3], found["0"][0, 3]])
    np.testing.assert_array_equal(found["own"][1], found["0"][1])
    np.testing.assert_array_equal(found["own"][2], found["all"][2])
    costs = {name: predicted_cost(recordings, config, "sm_100") for name, config in alone.items()}
    of_steps = [costs[name] for name in chosen]
    assert len(set(of_steps)) == 3
    assert predicted_cost(recordings, configurations["all"], "sm_100") == pytest.approx(np.mean(of_steps))
    recordings.sigmas = [1.0, 0.9, 0.81, 0.8, 0.6, 0.41, 0.4, 0.1]  # more steps than were recorded
    of_steps = [costs[name] for name in "00011122"]
    assert predicted_cost(recordings, configurations["all"], "sm_100") == pytest.approx(np.mean(of_steps))
    assert predicted_cost(recordings, alone["1"], "sm_100") == pytest.approx(costs["1"])
    unknown = [(fields | {"sigma": None}, tensors) for fields, tensors in calls]
    recordings = saved(tmp_path / "unknown", unknown, MODULES, "WanTransformer3DModel")
    assert predicted_cost(recordings, configurations["all"], "sm_100") == pytest.approx(costs["0"])


def test_calls_that_did_not_run_cost_what_full_precision_does(tmp_path):
    calls = [({"module": module}, random_tensors(3, 2048)) for module in MODULES]
    recordings = saved(tmp_path, calls, MODULES, "WanTransformer3DModel")
    config = DMAConfig(window=0, sink=0, min_length=0)
    whole = predicted_cost(recordings, config, "sm_100")

    def cost(*shares: float) -> float:
        return predicted_cost(recordings, config, "sm_100", dict(zip(MODULES, shares, strict=True)))

    assert whole < 0.9 and cost(1, 1, 1) == whole and cost(0, 0, 0) == 1
    assert cost(1, 0, 0.5) == pytest.approx((whole + 1) / 2)
    assert predicted_cost(recordings, config, "sm_100", {MODULES[0]: 0.0}) == pytest.approx(
        (2 * whole + 1) / 3
    )
    unknown = DMAConfig(high="mxint8", low="nvint4", min_length=0)
    assert predicted_cost(recordings, unknown, "sm_100", dict.fromkeys(MODULES, 0.0)) == 1


def test_what_was_not_recorded_is_null(tmp_path):
    calls = [
        ({}, random_tensors(0, 200, heads=2)),
        ({"module": MODULES[1]}, random_tensors(1, 200, heads=3, kv_heads=3)),
        ({"module": MODULES[1], "prompt": 1}, random_tensors(2, 200, heads=3, kv_heads=3)),
    ]
    recordings = saved(tmp_path, calls, MODULES)
    measured = measure(recordings, {"it": DMAConfig(min_length=0)}, "cpu")
    document = json.loads(json.dumps(to_json(recordings, measured), allow_nan=False))
    assert document["modules"] == list(MODULES[:2]) and document["steps"] == [0]
    (first, second), (absent, third) = document["configurations"]["it"]["relative_l2"]
    assert [value is None for value in first[0]] == [False, False, True] and absent == [[None] * 3]
    assert None not in second[0] + third[0]
    values = layers(recordings, measured)["relative_l2"]["it"]
    mean = measured["it"].of_modules
    np.testing.assert_allclose(values, [[mean[0, 0, 0]], [(mean[0, 1, 0] + mean[1, 1, 0]) / 2]])


def test_numbers_that_are_not_finite_are_refused(tmp_path, monkeypatch):
    """They would count as calls that were not recorded."""
    tensors = random_tensors(0, 200)
    recordings = saved(tmp_path / "good", [({}, tensors)], MODULES)
    broken = operator.attention(*tensors[:3])._replace(out=torch.full_like(tensors.q, math.inf))
    monkeypatch.setattr(operator, "attention", lambda *args, **options: broken)
    with pytest.raises(ValueError, match=r"configuration 'it' gives NaN or infinity on 0\.safetensors"):
        measure(recordings, {"it": DMAConfig(min_length=0)}, "cpu")
    tensors.v[0, 1, 5, 3] = math.nan
    recordings = saved(tmp_path / "bad", [({}, tensors)], MODULES)
    with pytest.raises(ValueError, match=r"0\.safetensors: attention gives NaN or infinity there"):
        measure(recordings, {"it": DMAConfig.preset("exact")}, "cpu")


def test_nothing_to_measure(tmp_path):
    with pytest.raises(ValueError, match="there are no recordings in"):
        measure(saved(tmp_path, [], MODULES), {"it": DMAConfig()}, "cpu")


@pytest.mark.parametrize(("config", "words"), [
    (DMAConfig(model="WanTransformer3DModel"), "it: this configuration is for WanTransformer3DModel, not for Flux"),
    (DMAConfig(modules={"blocks.0.attn": {"dense": True}}), "it: modules: .* has no blocks.0.attn to intercept"),
    (DMAConfig(dense_layers=(3,)), "it: dense_layers .* has 3 modules"),
])  # fmt: skip
def test_configurations_for_another_model_are_refused_before_recording(config, words, tmp_path):
    with pytest.raises(ValueError, match=words) as error:
        evaluate_attention(tiny_pipelines.flux(), ["a cat"], {"it": config}, tmp_path, {}, "command")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_evaluate_attention_of_a_pipeline(tmp_path):
    pipe = tiny_pipelines.flux()
    call = {"num_inference_steps": 2} | CALLS[type(pipe)]
    configurations = {"near": DMAConfig(), "far": DMAConfig(window=0, sink=0, protect_text=False)}
    document = evaluate_attention(
        pipe, ["a cat", "a dog"], configurations, tmp_path, call, "command", steps=2
    )
    assert document == json.loads((tmp_path / "attention.json").read_text())
    assert np.shape(document["layers"]["relative_l2"]["near"]) == (3, 2)
    assert np.shape(document["configurations"]["far"]["recall"]) == (2, 3, 2, 2)
    near, far = (document["summary"][name] for name in configurations)
    assert 0 < near["relative_l2"] < far["relative_l2"] < 0.5 and near["recall"] > far["recall"] == 0
    rows = table(document)
    assert [row[0] for row in rows] == list(configurations) and {len(row) for row in rows} == {len(HEADER)}
    worst = np.array(document["layers"]["relative_l2"]["far"]).mean(1).argmax()
    assert document["modules"][worst] in rows[1][4]


def test_classes_of_tiles_are_found_again_in_a_plan():
    """Block lists and bits of means give back the classes from which they were made."""
    layout = Layout(35 * 128, 35 * 128)
    classes = torch.randint(0, len(Class), (1, 2, 35, 35), generator=torch.Generator().manual_seed(1))
    assert torch.equal(tile_classes(plan.Plan(build_map(classes, layout))), classes)
