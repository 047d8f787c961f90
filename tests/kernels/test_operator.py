"""The registered operator: what it computes, what it refuses, what torch.compile sees."""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dma_diffusers.kernels import checks, operator
from dma_diffusers.kernels.call import Norms
from dma_diffusers.kernels.tiling.layout import Layout
from dma_diffusers.kernels.tiling.neighborhood import mask as neighborhood_mask
from dma_diffusers.kernels.tiling.neighborhood import neighborhood
from dma_diffusers.kernels.tiling.policies import Diagonal, Neighborhood
from dma_diffusers.kernels.tiling.precision_map import Class
from dma_diffusers.kernels.tiling.tile_order import TileOrder
from tests.kernels.calls import Call, by_reference, relative_l2
from tests.kernels.oracle import normalised, oracle, rotated


def test_it_is_the_reference_on_this_machine():
    call = Call(300, 300, 64, batch=2, text=(0, 20), tokens_first=True)
    q, k, v, _ = call.tensors()
    out, lse, inexact_rows = operator.attention(
        q, k, v, text_start=0, text_stop=20, lowering="reference", return_lse=True
    )
    expected, expected_lse = by_reference(q, k, v, call.map(), "mxfp8", "mxfp4")
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse) and inexact_rows.numel() == 0
    assert operator.attention(q, k, v, lowering="reference").lse.numel() == 0


def test_unmapped_calls_are_high_everywhere():
    call = Call(400, 400, 64, window=10_000)
    q, k, v, _ = call.tensors()
    out = operator.attention(q, k, v, mapped=False, lowering="reference").out
    assert torch.equal(out, by_reference(q, k, v, call.map(), "mxfp8", "mxfp4")[0])
    assert not torch.equal(out, operator.attention(q, k, v, lowering="reference")[0])


@pytest.mark.usefixtures("unrounded")
def test_no_band_no_sink_no_text_is_low_everywhere():
    call = Call(384, 384, 64, window=0, sink=0)
    q, k, v, _ = call.tensors()
    lse = operator.attention(
        q, k, v, policy="diagonal(window=0, sink=0)", lowering="reference", return_lse=True
    ).lse
    torch.testing.assert_close(lse.double(), oracle(call, q, k, v, None)[1], rtol=2e-5, atol=2e-5)


def test_each_head_has_its_own_window():
    call = Call(640, 640, 64, heads=4, kv_heads=2, text=(0, 20))
    q, k, v, _ = call.tensors()
    windows = (0, 128, 384, 10_000)

    def attend(window: int | tuple[int, ...]) -> torch.Tensor:
        return operator.attention(q, k, v, policy=Diagonal(window), text_stop=20, lowering="reference").out

    out = attend(windows)
    for head, window in enumerate(windows):
        alone, other = attend(window), attend(windows[head - 1])
        assert torch.equal(out[:, head], alone[:, head])
        assert not torch.equal(out[:, head], other[:, head])


class _Passing:
    """An observer that lets calls pass, and keeps their policies."""

    def __init__(self):
        self.seen: set[str] = set()

    def attention(self, call, asked, attend):
        self.seen.add(asked.policy)
        return attend(asked.policy)


class _High(_Passing):
    """An observer that makes every tile HIGH, and keeps the last call."""

    def attention(self, call, asked, attend):
        self.seen.add(asked.policy)
        self.call, self.asked = call, asked
        return attend(operator.DENSE)


@pytest.mark.parametrize("mapped", [True, False])
def test_an_observer_is_handed_the_call_and_what_it_asks_for(mapped):
    q, k, v = torch.randn(3, 1, 2, 300, 16).unbind()
    options = {"key_mask": torch.rand(1, 300) > 0.5, "scale": 0.3, "text_stop": 20, "return_lse": True}
    options["norms"] = Norms(*torch.rand(2, 16), 1e-6, 20, *torch.rand(2, 16), True)
    options["q_rope"] = tuple(torch.rand(2, 300, 8))
    words = ["dense(everywhere=low)", "diagonal(window=0, sink=0)"]
    options |= {"policy": words, "which": 1, "mapped": mapped, "low": "int8"}
    passing, high = _Passing(), _High()
    for expected, found in (
        (
            operator.attention(q, k, v, **options),
            operator.attention(q, k, v, **options, observer=operator.handle_of(passing)),
        ),
        (
            operator.attention(q, k, v, **options | {"mapped": False}),
            operator.attention(q, k, v, **options, observer=operator.handle_of(high)),
        ),
    ):
        assert torch.equal(found.out, expected.out) and torch.equal(found.lse, expected.lse)
    assert passing.seen == high.seen == {words[1] if mapped else operator.DENSE}
    call = high.call
    assert (call.q is q, call.scale, call.is_causal, call.k_rope, high.asked[1:]) == (
        True, 0.3, False, None, ("mxfp8", "int8", True)
    )  # fmt: skip
    assert call.key_mask is options["key_mask"] and call.q_rope[1] is options["q_rope"][1]
    assert all(a is b for a, b in zip(call.norms.tensors, options["norms"].tensors, strict=True))
    assert (call.norms.eps, call.norms.first, call.norms.rounds_twice) == (1e-6, 20, True)


@pytest.mark.parametrize(("low", "policy", "grid", "keys"), [
    ("mxfp4", "diagonal(window=128)", [], 130),
    ("int8", "diagonal(window=0/128/384/128)", [], 130),
    ("int8", "neighborhood(window=5x7, high=3x3)", [10, 20], 200),
])  # fmt: skip
def test_registration(low, policy, grid, keys):
    q = torch.randn(1, 4, 200, 40)
    k = torch.randn(1, 2, keys, 40)
    mask = torch.rand(1, k.shape[2]) > 0.5
    for return_lse in (False, True):
        ropes = (torch.randn(200, 20), torch.randn(200, 20), None, None)
        norms = (torch.randn(40), None, torch.randn(40), None, 1e-6, 0, False)
        arguments = (
            q,
            k,
            k,
            mask,
            *ropes,
            *norms,
            0.1,
            False,
            "mxfp8",
            low,
            [operator.DIAGONAL, policy],
            1,
            grid,
            0,
            0,
            1,
            False,
            True,
            "auto",
            "none",
            True,
            False,
            "bf16",
            return_lse,
        )
        torch.library.opcheck(torch.ops.dma_diffusers.attention.default, arguments)
        handle = operator.handle_of(watch := _Passing())
        torch.library.opcheck(torch.ops.dma_diffusers.observed_attention.default, (handle, *arguments))
        assert watch.seen == {policy}


def test_of_several_policies_one_counts():
    q, k, v = torch.randn(3, 1, 2, 300, 16).unbind()
    words = ["diagonal(window=0, sink=0)", "dense(everywhere=high)"]
    outs = [operator.attention(q, k, v, policy=each).out for each in words]
    assert not torch.equal(*outs)
    for number, expected in enumerate(outs):
        assert torch.equal(operator.attention(q, k, v, policy=words, which=number).out, expected)


def test_compiles_to_one_node_and_new_lengths_compile_nothing():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, dynamic=True, backend=backend)
    def attend(x):
        return operator.attention(x, x, x, text_stop=30)[0] * 2

    for length in (200, 300, 511):
        x = torch.randn(1, 2, length, 64)
        torch.testing.assert_close(attend(x), operator.attention(x, x, x, text_stop=30)[0] * 2)
    assert len(graphs) == 1
    packets = [getattr(node.target, "overloadpacket", node.target) for node in graphs[0].graph.nodes]
    assert packets.count(torch.ops.dma_diffusers.attention) == 1


@pytest.mark.parametrize(("grid", "text", "window", "stride", "head_dim"), [
    ((20, 30), (0, 0), (7, 9), (2, 3), 64),
    ((20, 30), (0, 20), (8, 8), None, 40),
    ((5, 9, 13), (585, 700), (3, 4, 5), (1, 2, 2), 72),
    ((700,), (3, 10), (50,), (7,), 64),
    ((32, 16), (0, 128), (16, 16), (8, 16), 64),
    ((7, 8), (0, 7), (7, 8), None, 64),
])  # fmt: skip
def test_a_neighborhood_is_what_its_mask_says(grid, text, window, stride, head_dim, request):
    """HIGH in bf16 everywhere; everything given and returned is in the tokens' own order."""
    length = math.prod(grid) + text[1] - text[0]
    call = Call(
        length,
        length,
        head_dim,
        batch=2,
        heads=4,
        kv_heads=2,
        masks_keys=True,
        has_rope=True,
        tokens_first=True,
    )
    q, k, v, mask = call.tensors()
    ropes = call.ropes()
    given = {
        **ropes, "high": "bf16", "low": "bf16", "policy": Neighborhood(window, stride, window), "grid": grid,
        "text_start": text[0], "text_stop": text[1], "return_lse": True,
    }  # fmt: skip
    out = operator.attention(q, k, v, mask, **given).out
    request.getfixturevalue("unrounded")
    lse = operator.attention(q, k, v, mask, **given).lse
    seen = torch.ones(length, length, dtype=torch.bool)
    on_grid = torch.tensor([token for token in range(length) if not text[0] <= token < text[1]])
    seen[on_grid[:, None], on_grid] = neighborhood_mask(neighborhood(grid, window, stride)[0])
    assert seen.all() == (window == grid)
    q, k = (rotated(x, ropes[f"{name}_rope"]).bfloat16().double() for name, x in (("q", q), ("k", k)))
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    scores = (q @ k.mT * head_dim**-0.5).masked_fill(~(seen & mask[:, None, None]), -math.inf)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=2e-5, atol=2e-5)
    assert relative_l2(out, scores.softmax(-1) @ v.double()) < 0.004


@pytest.mark.parametrize(("policy", "grid"), [("diagonal()", ()), ("neighborhood(high=5x5)", (19, 20))])
def test_a_mask_that_hides_text_alone(policy, grid):
    call = Call(400, 400, 64, masks_keys=True, text=(0, 20))
    q, k, v, mask = call.tensors()
    mask[:, 20:] = True
    options = {"text_stop": 20, "policy": policy, "grid": grid, "high": "bf16", "low": "bf16"}
    told = operator.attention(q, k, v, mask, masks_text=True, **options).out
    assert relative_l2(told, operator.attention(q, k, v, mask, **options).out) < 8e-3
    assert relative_l2(told, operator.attention(q, k, v, **options).out) > 1e-2


def test_near_tiles_of_a_grid_are_the_nearest_boxes():
    """Windows of 128 and 640 tokens make 1 and 5 of 8 tiles HIGH on a grid of 32×32, as many as on a sequence."""
    layout = Layout(1024, 1024, grid=(32, 32))
    for window, count in ((0, 0), (128, 1), (384, 3), (640, 5)):
        classes = Diagonal(window, 0, "grid").classes(
            Layout(1024, 1024), tile_order=TileOrder(layout, (8, 16))
        )
        assert (classes == Class.HIGH).sum(-1).unique().tolist() == [count]
    high = (classes[0, 0] == Class.HIGH).nonzero().tolist()  # 4 rows of 2 boxes, 8 tokens high and 16 wide
    assert [column for row, column in high if row == 2] == [0, 2, 3, 4, 6]


@pytest.mark.parametrize("rounds_twice", [False, True])
def test_norms_and_ropes_are_as_if_applied_before(rounds_twice):
    """The operator's norm is torch's or Diffusers', to the last bit, and its RoPE comes next."""
    call = Call(
        200, 200, 64, heads=4, has_norms=True, rounds_twice=rounds_twice, has_rope=True, dtype=torch.bfloat16
    )
    (q, k, v, _), ropes, norms = call.tensors(), call.ropes(), call.norms()
    found = operator.attention(q, k, v, norms=norms, **ropes, high="bf16", low="int8", return_lse=True)
    q, k = normalised(q, norms.q, norms.q_first, norms), normalised(k, norms.k, norms.k_first, norms)
    expected = operator.attention(q, k, v, **ropes, high="bf16", low="int8", return_lse=True)
    assert torch.equal(found.out, expected.out) and torch.equal(found.lse, expected.lse)
    other = replace(norms, rounds_twice=not rounds_twice)
    again = operator.attention(*call.tensors()[:3], norms=other, **ropes, high="bf16", low="int8")
    assert not torch.equal(again.out, expected.out)


@pytest.mark.parametrize(
    ("low", "gain"), [("int8", 0.65), ("int8_tile", 0.4), ("mxint8", 0.65), ("nvint4", 0.8)]
)
def test_a_rotation_spreads_outliers_and_keeps_the_scores(low, gain):
    """One channel of q is large and small in k: it spoils q's block, or its row, unless it is rotated."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 300, 64, generator=generator)
    q[..., 7] *= 10
    k[..., 7] /= 10
    exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    given = {"high": "bf16", "low": f"{low}/bf16", "policy": "dense(everywhere=low)"}

    def error(rotation: str) -> float:
        out = operator.attention(q, k, v, rotation=rotation, **given).out
        return relative_l2(out, exact)

    for rotation in ("hadamard16", "hadamard32", "head_dim"):
        assert error(rotation) < gain * error("none")
    alike = [operator.attention(q, k, v, rotation=name, high="bf16").out for name in ("none", "head_dim")]
    exactly = {"high": "bf16", "low": "bf16"}
    assert torch.equal(
        operator.attention(q, k, v, **exactly).out,
        operator.attention(q, k, v, rotation="hadamard32", **exactly).out,
    )
    assert not torch.equal(*alike)


def test_output_lies_as_models_go_on_with_it():
    q = torch.randn(2, 3, 100, 64)
    out = operator.attention(q, q, q).out
    assert out.transpose(1, 2).is_contiguous()


Q = torch.randn(1, 4, 64, 64)


@pytest.mark.parametrize(("change", "message"), [
    ({"q": Q[0]}, r"q must be \[B, H, Sq, D\]"),
    ({"k": Q[:, :3], "v": Q[:, :3]}, "Hkv divides H"),
    ({"v": Q[:, :, :5]}, "k and v alike"),
    ({"q": Q.double()}, "must be bf16, fp16 or fp32, got torch.float64"),
    ({"key_mask": torch.ones(1, 64)}, r"key_mask must be bool \[1, 64\], got torch.float32 \[1, 64\]"),
    ({"key_mask": torch.ones(1, 4, 64, 64, dtype=torch.bool)}, "key_mask must be bool"),
    ({"high": "fp3"}, "unknown format 'fp3': choose from bf16"),
    ({"policy": "diagonal(window=-1)"}, "window must be a whole number of tokens, 0 or more, got -1"),
    ({"policy": Diagonal((128, 384))}, "diagonal.* is for 2 heads, but q has 4"),
    ({"policy": "diagnoal()"}, "'diagnoal\\(\\)' is no policy: give dense"),
    ({"policy": "neighborhood(window=4x4)"}, "needs the grid that the tokens lie on, and none was given"),
    ({"policy": "neighborhood(window=4x4)", "grid": (8, 8), "is_causal": True}, "can't be had with a causal mask"),
    ({"policy": "neighborhood(window=4x4)", "grid": (64,)}, "window 4×4 is 2-D, but grid 64 is 1-D"),
    ({"grid": (8, 9)}, "grid 8×9 has 72 tokens, but of the call's 64, 0 of them text, 64 are left for it"),
    ({"grid": (8, 8), "text_stop": 5}, "grid 8×8 has 64 tokens, but of the call's 64, 5 of them text, 59 are left"),
    ({"grid": (8, 8), "k": Q[:, :, 1:], "v": Q[:, :, 1:]}, "as many queries as keys, got 64 and 63"),
    ({"grid": (4, 4, 2, 2)}, "a grid has 1 to 3 dimensions"),
    ({"text_start": 5, "text_stop": 99}, r"text range \(5, 99\) does not lie within the 64 keys"),
    ({"lowering": "native"}, "can't run mxfp8"),
    ({"q_rope": (torch.ones(64, 32),)}, "q_rope must be cosines and sines, got 1 tables"),
    ({"q": Q[:0], "k": Q[:0], "v": Q[:0]}, "lengths must be at least 1, as batch, heads and D"),
    ({"k": Q[:, :0], "v": Q[:, :0]}, "lengths must be at least 1"),
    ({"scale": 0.0}, "scale must be finite and more than 0, got 0.0"),
    ({"rotation": "hadamard"}, "unknown rotation 'hadamard': choose from none, hadamard16, hadamard32, head_dim"),
    (dict.fromkeys("qkv", Q[..., :40]) | {"rotation": "hadamard16"}, "needs a head_dim that 16 divides, and head_dim"),
    ({"scale": -0.1}, "scale must be finite and more than 0, got -0.1"),
    ({"k": Q[:, :1].expand(-1, 4, -1, -1)}, r"elements of k share memory \(shape \[1, 4, 64, 64\], strides"),
    ({"v": torch.as_strided(Q, Q.shape, (1, 64, 64, 1))}, "elements of v share memory"),
    ({"v": Q.to("meta")}, "must be on one device, got cpu, cpu, meta"),
    ({"key_mask": torch.ones(1, 64, dtype=torch.bool, device="meta")}, "must be on one device"),
    ({"q_rope": (torch.ones(63, 32), torch.ones(63, 32))}, r"q_rope must be two float32 tables \[S, D/2\] for q"),
    ({"k_rope": (torch.ones(64, 64), torch.ones(64, 64))}, r"k_rope must be .* got torch.float32 \[64, 64\]"),
    ({"k_rope": (torch.ones(64, 32).double(),) * 2}, "got torch.float64"),
    ({"norms": Norms(torch.ones(63), torch.ones(64), 1e-6)}, r"weights must be contiguous \[64\] on cpu, got \[63\]"),
    ({"norms": Norms(torch.ones(64), torch.ones(64).double(), 1e-6)}, "must be bf16, fp16 or fp32, got torch.float64"),
    ({"norms": Norms(torch.ones(64), torch.ones(64), -1.0)}, "eps must be finite and not negative, got -1.0"),
    ({"norms": Norms(torch.ones(64), torch.ones(64), 1e-6, 5, torch.ones(64))}, "got 5 tokens with 1 weights"),
    ({"norms": Norms(*[torch.ones(64)] * 2, 1e-6, 5, *[torch.ones(64).half()] * 2)},
     "must be torch.float32 like the others', got torch.float16"),
    ({"q": torch.zeros(1, 1, 8, 300), "k": torch.zeros(1, 1, 8, 300), "v": torch.zeros(1, 1, 8, 300)},
     "head_dim 300 is more than 256"),
    ({"k": Q[:, :, :0], "v": Q[:, :, :0]}, "lengths must be at least 1"),
])  # fmt: skip
def test_bad_calls_are_one_line(change, message):
    with pytest.raises(ValueError, match=message) as error:
        operator.attention(**({"q": Q, "k": Q, "v": Q} | change))
    assert "\n" not in str(error.value)


def test_autocast_changes_nothing():
    q = torch.randn(1, 2, 300, 64)
    plain = operator.attention(q, q, q, lowering="reference")[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(operator.attention(q, q, q, lowering="reference")[0], plain)


def test_without_triton_the_reference_runs():
    code = """
import sys
sys.modules["triton"] = None
import torch
from dma_diffusers.kernels import operator
q = torch.randn(1, 2, 300, 64)
assert operator.attention(q, q, q)[0].isfinite().all()
print(operator.choose(q.device, 64, "mxfp8", "mxfp4").lowering)
"""
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "reference"


def test_rope_tables_are_views_of_what_models_have():
    """Diffusers repeats each angle for both channels of a pair: every other column is the table."""
    call = Call(130, 130, 64, has_rope=True)
    q, k, v, _ = call.tensors()
    ropes = call.ropes()
    repeated = {
        name: tuple(table.repeat_interleave(2, -1)[:, ::2] for table in rope) for name, rope in ropes.items()
    }
    expected = by_reference(q, k, v, call.map(), "mxfp8", "mxfp4", **ropes)[0]
    assert torch.equal(operator.attention(q, k, v, **repeated).out, expected)
    assert not torch.equal(operator.attention(q, k, v).out, expected)


@pytest.mark.parametrize(("shape", "strides", "expected"), [
    ((2, 3, 5, 8), None, False), ((2, 3, 5, 8), (120, 8, 24, 1), False), ((2, 1, 5, 8), (40, 0, 8, 1), False),
    ((2, 3, 5, 8), (40, 0, 8, 1), True), ((1, 1, 5, 8), (0, 0, 4, 1), True), ((1, 1, 1, 1), (0, 0, 0, 0), False),
])  # fmt: skip
def test_aliases(shape, strides, expected):
    x = torch.empty(1000).as_strided(shape, strides) if strides else torch.empty(shape)
    assert checks.aliases(x) is expected


def test_too_many_rows_are_refused():
    q = torch.empty(2**17, 2**7, 1, 64, device="meta")  # tiles of 128 rows
    with pytest.raises(ValueError, match="heads times tokens must stay below 2"):
        checks._check_memory(q, Q, Q)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_nothing(default):
    q = torch.randn(1, 2, 300, 64)
    expected = operator.attention(q, q, q, high="bf16", low="nvfp4", return_lse=True)
    torch.set_default_dtype(default)
    try:
        given = operator.attention(q, q, q, high="bf16", low="nvfp4", return_lse=True)
        empty = operator.attention(q, q, q).lse
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(given.out, expected.out) and torch.equal(given.lse, expected.lse)
    assert given.lse.dtype == empty.dtype == torch.float32


@pytest.mark.parametrize("policy", ["diagonal(window=128, sink=0, near=grid)", "neighborhood(high=1x1x1)"])
def test_a_long_side_hides_no_key(policy):
    """Longer than spans of a window could hold: without one, all that is hidden are empty slots."""
    zeros = torch.zeros(1, 1, 3 * 520, 32)
    found = operator.attention(
        zeros, zeros, zeros, policy=policy, grid=(1, 520, 3), lowering="reference", return_lse=True
    )
    torch.testing.assert_close(found.lse.exp(), torch.full_like(found.lse, 3 * 520.0))
