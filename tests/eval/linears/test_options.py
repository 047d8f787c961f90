"""Linear layers in calibration: errors and costs of the ways, the search, and files that do what was chosen."""

import itertools

import numpy as np
import pytest
import torch
from torch.nn.functional import linear

from dma_diffusers import DMAConfig, apply, report, restore
from dma_diffusers.eval.cost import linear_clocks
from dma_diffusers.eval.linears.errors import squared_errors
from dma_diffusers.eval.linears.options import choice_of, observe, save_choice
from dma_diffusers.eval.linears.rows import ROWS, Rows, sampling
from dma_diffusers.eval.recordings.calibrate import calibrate
from dma_diffusers.eval.recordings.policy import LINEARS_HEADER, linears
from dma_diffusers.eval.recordings.record import record
from dma_diffusers.eval.recordings.search import Search
from dma_diffusers.kernels.linears.groups import Groups
from dma_diffusers.linears.plans import Plan
from dma_diffusers.linears.quantise import layer_of
from dma_diffusers.pipelines.generate import draw
from dma_diffusers.pipelines.load import load_pipeline, recommended_call
from tests import tiny_pipelines
from tests.eval.recordings.test_calibrate import GROUPS, every_choice, tables
from tests.tiny_pipelines import CALLS

MIXED = Groups(("mxfp4", "mxfp6_e2m3", "mxfp8"), (128, 64, 64))


@pytest.mark.parametrize(("target", "groups", "clocks"), [
    ("sm_90", None, 256 / 4096), ("sm_90", Groups.whole("fp8", 256), 256 / 8192),
    ("sm_90", Groups.whole("int8", 256), 256 / 8192), ("sm_90", MIXED, 256 / 8192),
    ("sm_100", MIXED, 128 / 32768 + 128 / 16384), ("sm_103", Groups.whole("nvfp4", 256), 256 / 49152),
])  # fmt: skip
def test_clocks_of_a_layer(target, groups, clocks):
    assert linear_clocks(target, 100, 48, 256, groups) == pytest.approx(2 * 100 * 48 * clocks)


def test_clocks_without_a_fast_product():
    with pytest.raises(ValueError, match="nvfp4 has no fast product on sm_90"):
        linear_clocks("sm_90", 100, 48, 256, Groups.whole("nvfp4", 256))


def test_errors_are_those_of_rounded_numbers():
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 32).requires_grad_(False)
    inputs = [torch.randn(20, 64), torch.randn(30, 64)]
    scales = torch.tensor([2.0**-4])
    errors = squared_errors(layer, Plan(Groups.whole("fp8", 64), None, float(scales)), inputs)
    weight_scale = layer.weight.abs().max() / 448
    weight = (layer.weight / weight_scale).to(torch.float8_e4m3fn).double() * weight_scale
    for x, error in zip(inputs, errors, strict=True):
        rounded = (x / scales).to(torch.float8_e4m3fn).double() * scales
        y, exact = linear(rounded, weight, layer.bias.double()), layer.double()(x.double())
        layer.float()
        assert error == pytest.approx(float(((y - exact) ** 2).sum() / (exact**2).sum()), rel=1e-4)
    assert squared_errors(layer, None, inputs) == [0.0, 0.0]
    assert 1e-7 < squared_errors(layer.bfloat16(), None, [x.bfloat16() for x in inputs])[0] < 1e-5


def test_layers_of_one_input_are_sampled_once():
    layers = {name: torch.nn.Linear(32, 32) for name in ("q", "k", "out")}
    rows = Rows(lambda step: step == 1)
    x = torch.arange(100.0)[:, None].expand(100, 32)
    with sampling(rows, layers):
        for _ in range(2):
            rows.prompt_begins()
            for step in range(3):
                rows.step_begins(step)
                layers["q"](x[None])
                layers["k"](x[None])  # another tensor, though an equal one
                y = x + step
                layers["q"](y)
                layers["k"](y)
                layers["out"](x + 1000)
    assert rows.first["k"] == "q" and rows.first["out"] == "out" and rows.steps == 2
    assert rows.tokens["out"] == 200 and len(rows.inputs("k")) == 2
    sampled = rows.inputs("out")[0]
    assert len(sampled) == ROWS == len(sampled[:, 0].unique()) and sampled.min() >= 1000
    assert not layers["q"]._forward_pre_hooks


@pytest.mark.parametrize("seed", range(3))
def test_no_choice_is_better_than_what_the_search_finds(seed):
    of_attention, generator = tables(seed), np.random.default_rng(seed)
    items = [(generator.random(ways) / 10, generator.random(ways) / 10) for ways in (3, 4)]
    attention = every_choice(*of_attention)
    further = np.array([
        sum(np.array([errors[way], costs[way]]) for (errors, costs), way in zip(items, ways, strict=True))
        for ways in itertools.product(range(3), range(4))
    ])  # fmt: skip
    choices = (attention[:, None] + further).reshape(-1, 2)
    search = Search(*of_attention, GROUPS, items)
    assert search.least == pytest.approx(choices[:, 0].min())
    costs = set()
    for budget in np.geomspace(search.most, search.least, 12):
        found = search.within(budget * (1 + 1e-9))
        assert search.error(found) <= budget * (1 + 1e-9)
        assert not (choices < np.array([search.error(found), search.cost(found)]) - 1e-12).all(1).any()
        costs.add(search.cost(found))
    assert len(costs) > 3


@pytest.fixture(scope="module")
def demo():
    return load_pipeline(), recommended_call() | {"num_inference_steps": 2, "height": 128, "width": 128}


@pytest.fixture(scope="module")
def recordings(demo, tmp_path_factory):
    pipe, call = demo
    folder = tmp_path_factory.mktemp("recordings")
    return record(pipe, ["a red apple left of a cat"], folder, call, steps=2, modules=[0, -1])


@pytest.fixture(scope="module")
def observed(demo, recordings):
    pipe, call = demo
    return observe(pipe, recordings, call, "sm_100")


@pytest.fixture(scope="module")
def items(observed):
    return observed[1]


@pytest.fixture(scope="module")
def policy(recordings, items):
    return calibrate(recordings, 0.5, target="sm_100", linears=items, device="cpu")


def test_each_input_has_ways_from_few_bits_to_many(items):
    assert sum(len(item.layers) for item in items) == 44 and len(items) == 24
    for item in items:
        kinds = [next(iter(way.values())) for way in item.ways]
        assert kinds[0] is None and item.errors[0] < 1e-12 and item.costs[0] == item.costs.max()
        four, eight = (kinds.index(Groups.whole(name, kinds[1].in_features)) for name in ("mxfp4", "mxfp8"))
        assert item.errors[four] == item.errors.max() and item.costs[four] == item.costs.min()
        assert item.costs[four] == pytest.approx(item.costs[0] / 4)
        assert item.costs[eight] == pytest.approx(item.costs[0] / 2)
        mixed = [i for i, groups in enumerate(kinds) if groups and len(groups.formats) > 1]
        assert mixed and all(
            item.errors[eight] < item.errors[i] < item.errors[four]
            and item.costs[four] < item.costs[i] <= item.costs[eight]
            for i in mixed
        )


def test_clocks_are_those_of_a_step(items):
    """The first item is the input of q, k and v: two calls of 256 tokens of the picture in each step."""
    assert items[0].layers[0].endswith("attn.to_q")
    assert items[0].costs[0] == pytest.approx(2 * (2 * 256) * 3 * 256 * 256 / 8192)


def test_one_budget_for_attention_and_linears(policy, items, recordings):
    errors, costs, bits = (
        np.array([getter(choice) for choice in policy.choices])
        for getter in (lambda c: c.relative_l2, lambda c: c.cost, lambda c: c.linears.bits)
    )
    assert (np.diff(errors) <= 1e-9).all() and (np.diff(costs) >= -1e-9).all() and (np.diff(bits) >= 0).all()
    assert bits[0] < 5 and bits[-1] == 16 and costs[0] < 0.75 * costs[-1]
    for choice in policy.choices:
        assert choice.relative_l2 <= choice.budget * 1.001
        together = (2 * choice.attention_l2**2 + 44 * choice.linears.relative_l2**2) / 46
        assert choice.relative_l2**2 == pytest.approx(together)
    assert choice_of(items, [0] * len(items)).is_stock and policy.choices[-1].linears.is_stock
    rows = linears(policy)
    assert {len(row) for row in rows} == {len(LINEARS_HEADER)}
    assert [row[-1] for row in rows][-1] == "44 of 44" and rows[0][0] == "0"


def test_the_file_quantises_as_chosen(policy, demo, observed, tmp_path):
    pipe, call = demo
    seen = observed[0]["transformer."]
    path = tmp_path / "policy.json"
    choice = policy.chosen
    save_choice(pipe, choice.linears, tmp_path / choice.file_of_linears(path.name))
    policy.save(path)
    config = DMAConfig.from_file(path)
    assert config.linears == str(tmp_path / "policy-0.5.safetensors")
    assert DMAConfig.from_file(path, quality=1).linears is None
    weights = sum(
        p.numel()
        for name, p in pipe.transformer.named_parameters()
        if f"transformer.{name}"[:-7] in choice.linears.groups
    )
    assert (tmp_path / "policy-0.5.safetensors").stat().st_size < weights / 8

    exact = draw(pipe, ["a red apple"], [0], call).latents
    stock = {name: layer_of(pipe.transformer, name) for name in ("transformer_blocks.0.attn.to_q",)}
    apply(pipe, config, lowering="stock")
    try:
        drawn = draw(pipe, ["a red apple"], [0], call).latents
        receipts = {receipt.module: receipt for receipt in report(pipe).linears if receipt.formats}
        mixed = [name for name, receipt in receipts.items() if len(receipt.formats) > 1]
        assert mixed
        for name in mixed:
            own = name.removeprefix("transformer.")
            order = seen.statistics(own).mean_abs.argsort(stable=True)
            assert layer_of(pipe.transformer, own).permutation.equal(order.int())
    finally:
        restore(pipe)
    groups = {name: of for name, of in choice.linears.groups.items() if of}
    assert {name: (r.formats, r.widths) for name, r in receipts.items()} == {
        name: (of.formats, of.widths) for name, of in groups.items()
    }
    assert drawn.isfinite().all() and not drawn.equal(exact)
    for name, layer in stock.items():
        assert layer_of(pipe.transformer, name) is layer
    assert draw(pipe, ["a red apple"], [0], call).latents.equal(exact)


def test_two_transformers_go_the_same_way_with_groups_of_their_own(tmp_path):
    """Published work wants eight bits for the first and last blocks of Wan, which are all that these have."""
    pipe = tiny_pipelines.wan22()
    call = {"num_inference_steps": 4} | CALLS[type(pipe)]
    recorded = record(pipe, ["a cat"], tmp_path / "recordings", call, steps=4)
    _, items = observe(pipe, recorded, call, "sm_100")
    assert {item.layers[0].rpartition(".")[2] for item in items} == {"proj", "2"}  # of ffn.net
    for item in items:
        assert [set(way.values()) for way in item.ways] == [{None}, {Groups.whole("mxfp8", 32)}]
        assert len(item.ways[0]) == 2 * len(item.layers)
    save_choice(pipe, choice_of(items, [1] * len(items)), tmp_path / "linears.safetensors")
    apply(pipe, linears=str(tmp_path / "linears.safetensors"))
    quantised = [receipt.module for receipt in report(pipe).linears if receipt.formats]
    assert {name.partition(".")[0] for name in quantised} == {"transformer", "transformer_2"}
    assert len(quantised) == 8


def test_a_transformer_that_no_recorded_step_ran(tmp_path):
    pipe = tiny_pipelines.wan22()
    call = {"num_inference_steps": 4} | CALLS[type(pipe)]
    recorded = record(pipe, ["a cat"], tmp_path, call, steps=1)
    with pytest.raises(ValueError, match="no linear layer ran in the recorded steps of every transformer"):
        observe(pipe, recorded, call, "sm_100")


def test_hopper_chooses_among_whole_formats(demo, recordings):
    pipe, call = demo
    items = observe(pipe, recordings, call, "sm_90")[1]
    formats = {groups and groups.formats for item in items for way in item.ways for groups in way.values()}
    assert formats == {None, ("fp8",), ("int8",)}
