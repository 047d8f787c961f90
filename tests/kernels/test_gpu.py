"""Tests that need a GPU: CUDA graphs, recorded launches, tensors past 2^31 elements, errors at a picture's length."""

import pytest
import torch
import torch.nn.functional as F

from dma_diffusers.kernels import operator
from dma_diffusers.kernels.call import Norms
from dma_diffusers.kernels.formats import get_format
from dma_diffusers.kernels.lowerings import FAITHFUL, architecture
from dma_diffusers.kernels.plan_cache import PlanCache
from tests.kernels.calls import relative_l2

pytestmark = pytest.mark.kernel


@pytest.fixture
def gpu() -> torch.device:
    triton = pytest.importorskip("triton")
    if triton.knobs.runtime.interpret or not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return torch.device("cuda")


@pytest.mark.parametrize(("high", "low"), [("bf16", "int8"), ("mxfp8", "mxfp4")])
def test_a_captured_call_sees_the_next_key_mask(high, low, gpu):
    """Nothing waits for the device, so a CUDA graph takes the whole call; the mask is read when it is replayed."""
    q, k, v = (torch.randn(2, 4, 700, 64, device=gpu, dtype=torch.bfloat16) for _ in range(3))
    mask = torch.ones(2, 700, dtype=torch.bool, device=gpu)

    def call():
        return operator.attention(q, k, v, mask, high=high, low=low, return_lse=True)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    mask[0, 300:] = False
    mask[1] = False
    graph.replay()
    expected = call()
    assert torch.equal(captured.out, expected.out) and torch.equal(captured.lse, expected.lse)
    assert (captured.out[1] == 0).all() and (captured.lse[1] == -torch.inf).all()


@pytest.mark.parametrize("tokens", [1024, 4173, 4608])
def test_pieces_of_a_split_round_are_added_in_one_order(tokens, gpu):
    """Whichever piece of a block of queries comes last, the bits are the same, and near those of float64."""
    q, k, v = (torch.randn(1, 24, tokens, 128, device=gpu, dtype=torch.bfloat16) for _ in range(3))
    arguments = {"high": "bf16", "low": "int8", "policy": "dense(everywhere=low)", "return_lse": True}
    out, lse, _ = operator.attention(q, k, v, **arguments)
    for _ in range(10):
        again = operator.attention(q, k, v, **arguments)
        assert torch.equal(again.out, out) and torch.equal(again.lse, lse)
    scores = (q.double() @ k.double().mT) / 128**0.5
    assert relative_l2(out, scores.softmax(-1) @ v.double()) < 0.045
    assert (lse - scores.logsumexp(-1)).abs().max() < 0.02


@pytest.mark.parametrize(
    "policy",
    [
        "dense(everywhere=low)",
        "diagonal(window=128, sink=0)",
        "importance(budget=0.3)",
        "importance(budget=0.3, by=pools)",
        "importance(budget=0.3, low=0.3, beyond=mean)",
    ],
)
def test_a_training_step_has_the_references_gradients_and_its_compiled_one_the_same_bits(policy, gpu):
    # Drawn anew, tiles nearly as important would be chosen one way by the kernel and the other by the reference.
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(1, 700, heads, 128, generator=generator) for heads in (4, 2, 2)]
    qkv = [x.to(gpu, torch.bfloat16).transpose(1, 2).requires_grad_() for x in drawn]
    gradient = torch.randn(qkv[0].shape, generator=generator).to(gpu, torch.bfloat16)

    def out(lowering: str, *qkv: torch.Tensor) -> torch.Tensor:
        return operator.attention(*qkv, high="bf16", low="int8", policy=policy, lowering=lowering).out

    def gradients(out) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(out, qkv, gradient)

    found = gradients(out("auto", *qkv))
    expected = gradients(out("reference", *qkv))
    assert all(relative_l2(own, other) < 0.05 for own, other in zip(found, expected, strict=True))
    compiled = gradients(torch.compile(out, fullgraph=True)("auto", *qkv))
    assert all(map(torch.equal, compiled, found))


@pytest.mark.parametrize("copies_first", [False, True])
def test_a_recorded_call_is_not_taken_for_one_whose_weights_are_other_tensors(copies_first, gpu):
    """Recordings find tensors by their addresses, each once: where two are one, others follow sooner."""
    q, k, v = (torch.randn(1, 2, 300, 128, device=gpu, dtype=torch.bfloat16) for _ in range(3))
    weights = [torch.rand(128, device=gpu, dtype=torch.bfloat16) + 0.5 for _ in range(2)]
    one = Norms(*weights, 1e-6, 0, *weights)
    several = Norms(*weights, 1e-6, 0, *(x.clone() for x in weights))
    outs = [
        operator.attention(q, k, v, norms=norms, high="bf16", low="int8").out
        for norms in ([several, one] if copies_first else [one, several])
        for _ in range(2)
    ]
    assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize("many", ["queries", "keys"])
def test_more_than_two_to_the_31_elements(many, gpu):
    if torch.cuda.get_device_properties(gpu).total_memory < 60 * 2**30:
        pytest.skip("needs a GPU of 60 GiB")
    tokens = 2**31 // 128 + 4096
    long, short = (torch.randn(1, 1, n, 128, device=gpu, dtype=torch.bfloat16) for n in (tokens, 128))
    q, k = (long, short) if many == "queries" else (short, long)
    v = torch.randn(1, 1, k.shape[2], 128, device=gpu, dtype=torch.bfloat16)
    out = operator.attention(q, k, v, high="bf16", low="int8", policy="diagonal(window=0, sink=0)").out
    last = slice(-4096, None)
    if many == "queries":
        expected = F.scaled_dot_product_attention(q[:, :, last].double(), k.double(), v.double())
        assert relative_l2(out[:, :, last], expected) < 0.06
    else:
        expected, keys = 0, 2**20
        total = torch.zeros(1, 1, 128, 1, device=gpu, dtype=torch.float64)
        for first in range(0, tokens, keys):
            part = slice(first, first + keys)
            p = (q.float() @ k[:, :, part].float().mT * 128**-0.5).exp().double()
            expected, total = expected + p.float() @ v[:, :, part].float(), total + p.sum(-1, keepdim=True)
        assert relative_l2(out, expected / total) < 0.06


def inputs(kind: str, gpu: torch.device) -> tuple[torch.Tensor, ...]:
    """q, k, v `[1, 2, 16384, 128]`: normal, or with outlier channels and keys and values that have a mean."""
    generator = torch.Generator(gpu).manual_seed(0)
    q, k, v = (torch.randn(1, 2, 16384, 128, device=gpu, generator=generator) for _ in range(3))
    if kind == "outliers":
        scale = torch.ones(128, device=gpu)
        scale[::16] = 8.0
        mean_k, mean_v = (torch.randn(128, device=gpu, generator=generator) * 4 for _ in range(2))
        q, k, v = q / scale.sqrt(), k * scale + mean_k, (v + mean_v) * scale
    return tuple(x.bfloat16() for x in (q, k, v))


def exact(q, k, v) -> torch.Tensor:
    """Attention in float64, some rows at a time."""
    parts = [
        F.scaled_dot_product_attention(rows.double(), k.double(), v.double()) for rows in q.split(1024, dim=2)
    ]
    return torch.cat(parts, dim=2)


@pytest.mark.parametrize(("kind", "most"), [("normal", 0.04), ("outliers", 0.006)])
def test_errors_at_a_pictures_length(kind, most, gpu):
    """HIGH in bf16 is as good as bf16 attention; LOW in INT8 stays within a few per cent."""
    q, k, v = inputs(kind, gpu)
    expected = exact(q, k, v)
    stock = relative_l2(F.scaled_dot_product_attention(q, k, v), expected)
    high = operator.attention(q, k, v, high="bf16", low="int8", mapped=False).out
    low = operator.attention(q, k, v, high="bf16", low="int8", policy="diagonal(window=0, sink=0)").out
    figures = {"stock": stock, "high": relative_l2(high, expected), "low": relative_l2(low, expected)}
    print(kind, figures)
    assert figures["high"] <= 1.5 * stock
    assert figures["low"] <= most


@pytest.mark.parametrize("fmt", [name for name in FAITHFUL if get_format(name).block])
def test_an_operator_call_counts_inexact_rows(fmt, gpu):
    if architecture(gpu) != "sm_90":
        pytest.skip("needs a GPU that re-encodes")
    q, k, v = (torch.randn(1, 1, 300, 64, device=gpu) for _ in range(3))
    assert operator.attention(q, k, v, low=fmt, policy="diagonal(window=0, sink=0)").inexact_rows.item() == 0
    q[..., 7, 32:] *= 2.0**-30
    wide = operator.attention(q, k, v, low=fmt, policy="diagonal(window=0, sink=0)")
    assert wide.inexact_rows.item() == int(fmt in ("mxfp4", "mxfp6_e2m3", "mxfp6_e3m2"))
    assert wide.out.isfinite().all()


def drawn(gpu: torch.device, seed: int, shift: int = 0) -> tuple[torch.Tensor, ...]:
    """q, k, v `[2, 4, 700, 128]` as views of [B, S, H, D], which begins `shift` elements behind an aligned address."""
    generator = torch.Generator(gpu).manual_seed(seed)
    numbers = torch.randn(3, 2 * 700 * 4 * 128, device=gpu, generator=generator).bfloat16()
    memory = F.pad(numbers, (shift, 8 - shift))
    return tuple(x[shift : shift + numbers.shape[1]].view(2, 700, 4, 128).transpose(1, 2) for x in memory)


@pytest.mark.parametrize("options", [
    {}, {"policy": "dense(everywhere=low)"}, {"policy": "importance(budget=0.2)"},
    {"policy": "importance(budget=0.2, by=pools)"}, {"high": "mxfp8", "low": "mxfp4"},
    {"policy": "neighborhood(window=9x12)", "grid": (25, 28)}, {"low": "int8/bf16"}, {"high": "bf16/fp8"},
    {"low": "nvfp4"}, {"mapped": False}, {"policy": "dense(everywhere=mean)"},
    {"policy": "neighborhood(window=9x12, beyond=mean)", "grid": (25, 28)},
    {"policy": "neighborhood(window=9x12, beyond=mean) | importance(budget=0.1)", "grid": (25, 28)},
], ids=str)  # fmt: skip
def test_calls_after_the_first_give_the_bits_of_the_first(options, gpu, monkeypatch):
    """Recorded launches, on other tensors, unaligned ones, on two streams and in a graph."""
    options = {"high": "bf16", "low": "int8", "return_lse": True} | options

    def again(*tensors, **more):
        return operator.attention(*tensors, **options, **more)

    def first(seed):
        monkeypatch.setattr(operator, "_PLANS", PlanCache())  # nothing is recorded yet
        return again(*drawn(gpu, seed))

    expected = {seed: first(seed) for seed in (1, 2, 3)}
    for seed in (1, 2, 3, 1):
        found = again(*drawn(gpu, seed))
        for x, y in zip(found, expected[seed], strict=True):
            assert torch.equal(x, y)
    assert torch.equal(again(*drawn(gpu, 1, shift=4)).out, expected[1].out)
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    found = []
    for turn in range(8):
        with torch.cuda.stream(streams[turn % 2]):
            found.append(again(*drawn(gpu, 1 + turn % 2)))
    torch.cuda.synchronize()
    for turn, result in enumerate(found):
        assert torch.equal(result.out, expected[1 + turn % 2].out)
    tensors = drawn(gpu, 2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = again(*tensors)
    for x, y in zip(tensors, drawn(gpu, 3), strict=True):
        x.copy_(y)
    again(*drawn(gpu, 1))
    graph.replay()
    assert torch.equal(captured.out, expected[3].out) and torch.equal(captured.lse, expected[3].lse)


def test_a_graph_keeps_its_plan(gpu, monkeypatch):
    monkeypatch.setattr(operator, "_PLANS", PlanCache(most=1))
    q, k, v = (x[:, :, :600].contiguous() for x in drawn(gpu, 1))
    expected = operator.attention(q, k, v, high="bf16", low="int8").out
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = operator.attention(q, k, v, high="bf16", low="int8").out
    for length in (300, 400, 500):
        operator.attention(*(x[:, :, :length] for x in (q, k, v)), high="bf16", low="int8")
        torch.full((2**20,), -1, dtype=torch.int32, device=gpu)  # takes the memory of plans that were dropped
    graph.replay()
    assert torch.equal(captured, expected)
