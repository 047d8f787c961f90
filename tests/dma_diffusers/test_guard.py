"""The guard: its estimate is the true error, and what is bad turns back, within the step in which it shows."""

import copy
import logging
import math
import os
import threading

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from torch.utils.flop_counter import FlopCounterMode

from dma_diffusers import apply, guard, report
from dma_diffusers.guard import KV_HEADS, ROWS, interval, relative, sampled_heads, sampled_rows, squares
from dma_diffusers.kernels import operator
from dma_diffusers.kernels.operator import DENSE
from tests import tiny_pipelines
from tests.dma_diffusers import tiny_models
from tests.tiny_pipelines import draw

GENUINE = operator._attention
DIAGONAL = "diagonal(window=128, sink=128)"


@pytest.fixture
def spoil(monkeypatch):
    """Lets a function change the output of the operator's calls, given their arguments."""

    def plant(change):
        def attention(**asked):
            out, *others = GENUINE(**asked)
            change(asked, out)
            return out, *others

        monkeypatch.setattr(operator, "_attention", attention)

    return plant


def policy(asked) -> str:
    return asked["policies"][asked["which"]]


def levels(pipe) -> list[int]:
    """Levels by what the receipts say: 0 as asked, 1 HIGH, 2 stock."""
    return [
        2 if module.lowering == "stock" else 1 if module.policy == DENSE else 0
        for module in report(pipe).modules
        if module.policy
    ]


def all_high(pipe, **fields) -> torch.Tensor:
    apply(pipe, policy=DENSE, **fields)
    return draw(pipe)


@pytest.mark.parametrize("name", ["flux", "sd3", "wan", "hunyuan", "z_image", "cogvideox"])
def test_the_estimate_is_near_the_error_of_all_rows(name, monkeypatch):
    """It is within a factor of 1.3, from 8 rows of each head of each call."""
    every: list[torch.Tensor] = []

    def squares_of_all(call, out, rows):
        every.append(squares(call, out, range(call.q.shape[2])))
        return squares(call, out, rows)

    monkeypatch.setattr(guard, "squares", squares_of_all)
    monkeypatch.setattr(guard, "interval", lambda queries: 1)
    pipe = getattr(tiny_pipelines, name)()
    apply(pipe, low="mxfp4", high="mxfp4", min_length=0, guard=math.inf)
    drawn = draw(pipe)
    receipt = report(pipe)
    sampled = [module for module in receipt.modules if module.sampled_rows]
    true = relative(torch.stack(every).unflatten(0, (-1, len(sampled))).sum(0))  # modules take turns
    assert len(sampled) > 1 and min(true) > 0.01
    for module, expected in zip(sampled, true.tolist(), strict=True):
        assert expected / 1.3 < module.relative_error < expected * 1.3
    assert f"estimated from {sum(module.sampled_rows for module in sampled):,} rows" in str(receipt)
    apply(pipe, low="mxfp4", high="mxfp4", min_length=0)
    assert torch.equal(draw(pipe), drawn)
    assert {module.relative_error for module in report(pipe).modules} == {None}


def test_an_exact_module_errs_by_nothing():
    pipe = tiny_pipelines.flux()
    apply(pipe, high="bf16", low="bf16", guard=0.2)
    draw(pipe)
    assert all(0 < module.relative_error < 0.005 for module in report(pipe).modules)
    assert relative(torch.zeros(2)) == 0


def test_nothing_turns_at_usual_settings(caplog):
    pipe = tiny_pipelines.flux()
    apply(pipe)
    drawn = draw(pipe)
    apply(pipe, guard=0.2)
    assert torch.equal(draw(pipe), drawn)
    assert levels(pipe) == [0, 0, 0] and not any(module.turned for module in report(pipe).modules)
    assert not [each for each in caplog.records if each.levelno >= logging.WARNING]


def test_non_finite_output_turns_every_module_to_high_in_the_same_step(spoil, caplog):
    pipe = tiny_pipelines.flux()
    expected = all_high(pipe)
    spoil(lambda asked, out: out.fill_(math.nan) if policy(asked) != DENSE else None)
    apply(pipe, guard=math.inf)
    assert not draw(pipe).isfinite().any()  # it is the guard that helps
    assert [module.turned for module in report(pipe).modules] == [()] * 3
    caplog.clear()
    apply(pipe, guard=0.2)
    assert torch.equal(draw(pipe), expected)
    assert levels(pipe) == [1, 1, 1]
    words = f"with mxfp8|mxfp4 {DIAGONAL} its output was not finite: every tile is HIGH from now on"
    assert {module.turned for module in report(pipe).modules} == {(words,)}
    said = f"guard: transformer.single_transformer_blocks.0.attn: {words}"
    assert said in str(report(pipe)) and said.replace("transformer.", "", 1) in caplog.text
    assert torch.equal(draw(pipe), expected)  # also from now on, without another warning
    assert len([each for each in caplog.records if each.levelno == logging.WARNING]) == 3
    spoil(lambda asked, out: None)
    apply(pipe, guard=0.2)  # applying again begins anew
    draw(pipe)
    assert levels(pipe) == [0, 0, 0]


@pytest.mark.parametrize("name", ["flux", "sd3", "wan", "hunyuan", "z_image"])
def test_where_high_is_bad_too_stock_attention_runs(name, spoil):
    pipe = getattr(tiny_pipelines, name)()
    stock = draw(pipe)
    spoil(lambda asked, out: out.fill_(math.inf))
    apply(pipe, guard=0.2)
    torch.testing.assert_close(draw(pipe), stock)
    assert set(levels(pipe)) == {2}
    receipts = [module for module in report(pipe).modules if module.turned]
    assert {module.reason for module in receipts} == {"the guard turned to it"}
    assert {len(module.turned) for module in receipts} == {2}
    assert {module.relative_error for module in receipts} == {None}


@pytest.mark.parametrize("comes_back", [False, True])
def test_one_row_in_a_call_that_is_not_sampled_is_found(comes_back, spoil):
    """The model's own output shows it, in the second step. Nothing turns if it does not come back in that step."""
    pipe = tiny_pipelines.flux()
    high = all_high(pipe)
    apply(pipe)
    low, calls = draw(pipe), []

    def change(asked, out):
        if policy(asked) != DENSE:
            calls.append(out)
            if len(calls) == 5 or (comes_back and len(calls) > 5):
                out[:, :, 211] = math.nan

    spoil(change)
    apply(pipe, guard=0.2)
    drawn = draw(pipe)
    assert drawn.isfinite().all() and not torch.equal(drawn, high)
    assert torch.equal(drawn, low) != comes_back
    assert levels(pipe) == ([1, 1, 1] if comes_back else [0, 0, 0])


def test_garbage_in_one_module_turns_that_module(spoil):
    pipe = tiny_pipelines.flux()
    own = {"single_transformer_blocks.0.attn": {"window": 384}}
    apply(pipe, modules={"single_transformer_blocks.0.attn": {"dense": True}})
    expected = draw(pipe)
    garbage = torch.Generator().manual_seed(0)
    spoil(lambda asked, out: out.normal_(generator=garbage) if "384" in policy(asked) else None)
    apply(pipe, modules=own, guard=0.2)
    assert torch.equal(draw(pipe), expected)
    assert levels(pipe) == [0, 1, 0]
    (words,) = report(pipe).modules[1].turned
    assert words.startswith("with mxfp8|mxfp4 diagonal(window=384, sink=128) a call's relative error of ")
    assert words.endswith(" passed 0.2: every tile is HIGH from now on")


def test_outliers_in_fp4_turn_and_the_picture_comes_near_stock():
    pipe = tiny_pipelines.flux()
    for block in (*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks):
        for name in ("norm_q", "norm_k"):
            with torch.no_grad():
                getattr(block.attn, name).weight[3:5] = 6.0
    stock = draw(pipe)
    errors = []
    for bound in (math.inf, 0.1):
        apply(pipe, policy="dense(everywhere=low)", guard=bound)
        errors.append(float((draw(pipe) - stock).norm() / stock.norm()))
    assert 1 in levels(pipe) and errors[1] < errors[0] / 2


def test_a_dense_module_that_is_bad_turns_to_stock(spoil):
    pipe = tiny_pipelines.flux()
    apply(pipe, dense_layers=(0, 1), lowering="reference")
    spoil(lambda asked, out: out.zero_() if policy(asked) == DENSE else None)
    apply(pipe, dense_layers=(0, 1), guard=0.2)
    draw(pipe)
    assert levels(pipe) == [2, 2, 0]
    assert report(pipe).modules[0].turned == (
        "with every tile HIGH a call's relative error of 1 passed 0.2: stock attention from now on",
    )


@pytest.mark.parametrize("fields", [
    {"dense_above_sigma": 0.9},
    {"schedule": "sigma>0.9: diagonal(window=384) low=int8; diagonal(window=384)"},
])  # fmt: skip
def test_the_first_call_of_every_entry_of_a_schedule_is_sampled(fields):
    pipe = tiny_pipelines.flux()
    apply(pipe, **fields, guard=math.inf)
    draw(pipe)
    assert {module.sampled_rows for module in report(pipe).modules} == {2 * 2 * ROWS}  # steps, heads, rows


def test_what_is_bad_before_attention_turns_nothing(caplog):
    pipe = tiny_pipelines.flux()
    apply(pipe, guard=0.2)
    with torch.no_grad():
        pipe.transformer.transformer_blocks[0].attn.to_q.weight[0, 0] = math.nan
    assert draw(pipe).isnan().all()
    assert levels(pipe) == [0, 0, 0]
    assert [module.intercepted for module in report(pipe).modules] == [3] * 3  # the first step was made again
    assert caplog.text.count("its output is not finite even so") == 1


def test_fallbacks_are_no_concern_of_it():
    pipe = tiny_pipelines.flux()
    apply(pipe, min_length=10_000, guard=0.2)
    draw(pipe, latents=torch.full((1, 480, 16), math.nan))
    assert {module.fallbacks["fewer than 10000 keys"] for module in report(pipe).modules} == {2}


def test_caches_keep_nothing_bad(spoil):
    """The first block cache compares with what it kept: it would go on with NaN."""
    pipe = tiny_pipelines.flux()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=10))
    expected = all_high(pipe)
    spoil(lambda asked, out: out.fill_(math.nan) if policy(asked) != DENSE else None)
    apply(pipe, guard=0.2)
    assert torch.equal(draw(pipe), expected)
    assert levels(pipe) == [1, 1, 1]


def test_two_transformers_have_guards_of_their_own(spoil):
    pipe, running = tiny_pipelines.wan22(), []
    for name in ("transformer", "transformer_2"):
        getattr(pipe, name).register_forward_pre_hook(lambda model, args, name=name: running.append(name))
    spoil(lambda asked, out: out.zero_() if running[-1] == "transformer" else None)
    apply(pipe, guard=0.2)
    draw(pipe, num_inference_steps=4)
    assert set(running) == {"transformer", "transformer_2"}
    modules = [module for module in report(pipe).modules if module.policy]
    assert len(modules) == 4
    assert {module.module.split(".")[0] for module in modules if module.turned} == {"transformer"}
    assert all(module.turned or module.relative_error < 0.2 for module in modules)


@torch.no_grad()
def test_a_copy_is_watched_on_its_own(spoil):
    case = tiny_models.make("flux")
    (text,) = case.texts(1)
    apply(case.model, min_length=0, guard=0.2)
    case.run(text)
    copied = copy.deepcopy(case.model)
    spoil(lambda asked, out: out.zero_() if policy(asked) != DENSE else None)
    genuine, case.model = case.model, copied
    case.run(text)
    assert levels(copied) == [0, 0, 0]  # its first calls were sampled before it was copied
    apply(copied, min_length=0, guard=0.2)
    case.run(text)
    assert levels(copied) == [1, 1, 1] and levels(genuine) == [0, 0, 0]


@torch.no_grad()
def test_threads_have_steps_of_their_own(spoil, monkeypatch):
    monkeypatch.setattr(guard, "interval", lambda queries: 1)
    model = tiny_models.make("flux").model
    cases = [tiny_models.make("flux") for _ in range(2)]
    for case, entries in zip(cases, (1, 2), strict=True):
        case.model = model
        case.latents = case.latents.repeat(entries, 1, 1, 1)
        case.inputs["pooled_projections"] = case.inputs["pooled_projections"].repeat(entries, 1)
    texts = [case.texts(1)[0] for case in cases]
    apply(model, min_length=0, policy=DENSE)
    expected = [case.run(text) for case, text in zip(cases, texts, strict=True)]
    spoil(lambda asked, out: out.fill_(math.nan) if policy(asked) != DENSE else None)
    apply(model, min_length=0, guard=0.2)
    found: list[torch.Tensor | None] = [None, None]
    barrier = threading.Barrier(2)

    @torch.no_grad()
    def work(number: int) -> None:
        barrier.wait()
        for _ in range(3):
            found[number] = cases[number].run(texts[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for each, high in zip(found, expected, strict=True):
        torch.testing.assert_close(each, high)


class Backend:
    """A backend of torch.compile that keeps the operators' names."""

    def __init__(self):
        self.nodes: list[list[str]] = []

    def __call__(self, graph, inputs):
        self.nodes.append(
            [str(node.target) for node in graph.graph.nodes if "dma_diffusers" in str(node.target)]
        )
        return graph


@pytest.mark.parametrize("method", ["compile", "compile_repeated_blocks"])
def test_compiled_graphs_are_guarded_without_more_of_them(method, spoil):
    torch.compiler.reset()
    pipe = tiny_pipelines.flux(num_single_layers=4)
    expected = all_high(pipe)
    counts = []
    for bound in (None, 0.2):
        torch.compiler.reset()
        backend = Backend()
        apply(pipe, guard=bound)
        getattr(pipe.transformer, method)(backend=backend, fullgraph=True)
        low = draw(pipe)
        counts.append([len(nodes) for nodes in backend.nodes if nodes])
    assert counts[0] == counts[1]
    assert {name for nodes in backend.nodes for name in nodes} == {"dma_diffusers.observed_attention.default"}
    assert {module.sampled_rows for module in report(pipe).modules} == {2 * ROWS}
    spoil(lambda asked, out: out.fill_(math.nan) if policy(asked) != DENSE else None)
    assert not torch.equal(low, expected)
    assert torch.equal(draw(pipe), expected)
    assert levels(pipe) == [1] * 5
    assert [len(nodes) for nodes in backend.nodes if nodes] == counts[1]


@pytest.mark.kernel
def test_cuda_graphs_of_torch_compile_leave_guarded_calls_out(spoil):
    """A CUDA graph replays its launches without asking the guard, so a guarded call must stay out of it."""
    if os.environ.get("TRITON_INTERPRET") == "1" or not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    torch.compiler.reset()
    pipe = tiny_pipelines.flux(head_dim=64).to("cuda", torch.bfloat16)
    fields = {"min_length": 0, "high": "bf16", "low": "int8"}
    high = all_high(pipe, **fields)
    apply(pipe, **fields, guard=0.2)
    eager = draw(pipe)
    apply(pipe, **fields, guard=0.2)
    pipe.transformer.compile_repeated_blocks(mode="reduce-overhead", fullgraph=True)
    for _ in range(3):  # a warm-up, a recording, a replay
        torch.compiler.cudagraph_mark_step_begin()
        torch.testing.assert_close(draw(pipe), eager, rtol=0.05, atol=0.05)
    assert all(module.sampled_rows and module.relative_error < 0.1 for module in report(pipe).modules)
    spoil(lambda asked, out: out.fill_(math.nan) if policy(asked) != DENSE else None)
    torch.testing.assert_close(draw(pipe), high, rtol=0.05, atol=0.05)
    assert levels(pipe) == [1, 1, 1]


@torch.no_grad()
def test_an_exported_model_has_the_plain_operator():
    case = tiny_models.make("flux")
    (text,) = case.texts(1)
    call = case.call(text) | {"return_dict": False}
    apply(case.model, min_length=0, guard=0.2)
    eager = case.model(**call)[0]
    exported = torch.export.export(case.model, args=(), kwargs=call)
    assert sum("dma_diffusers.attention" in str(node.target) for node in exported.graph.nodes) == 3
    assert torch.equal(exported.module()(**call)[0], eager)


@pytest.mark.parametrize("length", [256, 1024, 4096])
def test_sampling_takes_one_per_cent_of_the_attention_s_operations_at_most(length):
    """Multiplications of the exact rows, beside those of the attention, over one interval of calls."""
    q, k, v = torch.randn(3, 1, 1, length, 16).unbind()

    def operations(function) -> int:
        with FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops()

    attention = operations(lambda: torch.softmax(q @ k.mT, -1) @ v)
    call = operator.Call(q, k, v)
    sampled = operations(lambda: squares(call, q, sampled_rows(length, 0)))
    assert sampled == attention * ROWS / length
    assert sampled <= 0.01 * attention * interval(length)
    assert 7500 <= 0.01 * length * interval(length) < 7500 + 2 * 0.01 * length  # in rows
    assert interval(length) % 2


def test_rows_are_spread_and_change_from_call_to_call():
    for queries in (1, 5, 130, 4608):
        for count in range(4):
            rows = sampled_rows(queries, count)
            assert rows[0] >= 0 and rows[-1] < queries and len(rows) == min(ROWS, queries)
    starts = {sampled_rows(4608, count)[0] for count in range(20)}
    assert len(starts) == 20 and max(starts) - min(starts) > 400


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 6, 24, 40])
def test_every_head_is_sampled_in_turn(kv_heads):
    samples = [sampled_heads(kv_heads, number) for number in range(kv_heads)]
    assert {head for heads in samples for head in heads} == set(range(kv_heads))
    assert all(0 < len(heads) <= KV_HEADS for heads in samples)


def test_a_sample_is_of_the_heads_that_it_names():
    """One head of six, shared by two of twelve query heads each, is off: samples of others don't see it."""
    call = operator.Call(*(torch.randn(1, heads, 300, 16) for heads in (12, 6, 6)))
    exact = torch.softmax(call.q @ call.k.repeat_interleave(2, 1).mT / 4, -1) @ call.v.repeat_interleave(2, 1)
    exact[:, 11] = 0
    watch = guard.Watch(guard.Guard(0.2, None), "attn", 0)
    every = interval(300)
    errors = [float(relative(squares(*watch._sample(call, exact, number * every)))) for number in range(3)]
    assert [sampled_heads(6, number) for number in range(3)] == [range(0, 4), range(4, 6), range(2, 6)]
    assert errors[0] < 1e-5 and min(errors[1:]) > 0.1


def test_without_a_bound_nothing_waits():
    """There are no hooks on the model, of which one would wait."""
    pipe = tiny_pipelines.flux()
    for bound, hooks in ((None, 1), (math.inf, 1), (0.2, 2)):
        apply(pipe, guard=bound)
        assert len(pipe.transformer._forward_hooks) == hooks
