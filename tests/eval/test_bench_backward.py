"""`bench attention --backward`: what it computes, what it prints, and what only a GPU can show of it."""

import json

import pytest
import torch
import torch.nn.functional as F

from dma_diffusers.cli import main
from dma_diffusers.eval.bench import backward as bench
from dma_diffusers.eval.bench import timing
from dma_diffusers.eval.bench.bound import current_gpu
from dma_diffusers.eval.bench.entries import FULL, OURS, Config
from dma_diffusers.eval.bench.shapes import parse
from dma_diffusers.kernels import plan
from dma_diffusers.kernels.tiling.layout import Layout
from dma_diffusers.kernels.tiling.policies import parse as parse_policy
from tests.eval.test_bench import H200, SHAPE

INT8 = Config("bf16", "int8", window=0, sink=0, backward="int8")
ERRORS = [0.002, 0.003, None]


def timed(name: str, kind: str, backward: float, both: float, skipped: float = 0.0) -> dict:
    parts = {"backward": {"ms": backward, "host_us": 50.0}, "both": {"ms": both, "host_us": 90.0}}
    return {
        "name": name,
        "kind": kind,
        "skipped": skipped,
        "relative_l2": ERRORS,
        "peak_bytes": 2**21,
    } | parts


ENTRIES = [timed("cuDNN", FULL, 1.25, 1.75), timed("ours", OURS, 2.5, 3.5, 0.5)]
ABSENT = {"name": "FlashAttention-4", "kind": FULL, "absent": "No module named 'flash_attn'"}


def test_exact_gradients_are_autograds_in_float64():
    torch.manual_seed(0)
    qkv = [torch.randn(2, 3, 1100, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    gradient = torch.randn(2, 3, 1100, 8, dtype=torch.float64)
    expected = torch.autograd.grad(F.scaled_dot_product_attention(*qkv), qkv, gradient)
    found = bench.exact_gradients(*(x.detach() for x in qkv), gradient)
    assert all(torch.allclose(own, other[-1, -1]) for own, other in zip(found, expected, strict=True))


def test_both_passes_and_one_alone_give_the_gradients_of_each_copy():
    torch.manual_seed(0)
    copies = [tuple(torch.randn(1, 1, 5, 8) for _ in range(3)) for _ in range(2)]
    gradient = torch.randn(1, 1, 5, 8)
    backward, both = bench.passes(F.scaled_dot_product_attention, copies, gradient)
    for number in range(3):
        exact = bench.exact_gradients(*copies[number % 2], gradient)
        for call in (backward, both):
            assert all(
                torch.allclose(own[0, 0].double(), other, atol=1e-5)
                for own, other in zip(call(number), exact, strict=True)
            )


def test_speeds_count_five_products_and_seven_beside_the_best_peer():
    found = bench.compared(SHAPE, [dict(entry) for entry in ENTRIES])
    assert found[1]["backward"]["tflops"] == pytest.approx(SHAPE.flop * 2.5 / 2.5e-3 / 1e12)
    assert found[1]["both"]["tflops"] == pytest.approx(SHAPE.flop * 3.5 / 3.5e-3 / 1e12)
    assert [entry["backward"]["over_full"] for entry in found] == [1, 0.5]
    assert bench.cells([found[1], ABSENT]) == [
        ["ours", "2.500", "261", "0.50", "3.500", "261", "0.50", "50", "0.0020", "0.0030", "NaN", "2"],
        ["FlashAttention-4: No module named 'flash_attn'", *[""] * 11],
    ]
    alone = bench.compared(SHAPE, [dict(ENTRIES[1])])
    assert alone[0]["both"]["over_full"] is None and bench.cells(alone)[0][3] == ""


@pytest.mark.parametrize(("policy", "share"), [
    ("dense()", 1),
    ("diagonal(window=128, sink=0)", 1),
    ("importance(budget=0.25)", 1),
    ("importance(budget=0.25, low=0.25, beyond=skip)", 0.5),
    ("diagonal(window=128, sink=0) | importance(budget=0.25, beyond=mean)", 0.375),
    ("neighborhood(window=128, stride=128)", 0.125),
])  # fmt: skip
def test_the_share_of_tiles_is_the_maps(policy, share):
    grid = (1024,) if "neighborhood" in policy else ()
    assert bench.share_of_tiles(plan.make(parse_policy(policy), Layout(1024, 1024, (0, 0), grid))) == share


@pytest.fixture
def pretended(monkeypatch):
    """A GPU that isn't there, on which every way takes as long as `ENTRIES` say."""

    def measure(shape, ways, gpu, kind, seed, seconds, on_step):
        entries = [entry | {"name": way.name} for way, entry in zip(ways[-2:], ENTRIES, strict=True)]
        return {"size": list(shape.size), "copies": 1, "entries": bench.compared(shape, entries)}

    run = bench.bench_backward
    monkeypatch.setattr(timing, "require_gpu", lambda: None)
    monkeypatch.setattr(bench, "require_gpu", lambda: None)
    monkeypatch.setattr(bench, "current_gpu", lambda: H200)
    monkeypatch.setattr(bench, "bench_backward", lambda *arguments: run(*arguments, measure=measure))


def command(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit status, standard output and error of `bench attention --backward`."""
    monkeypatch.setattr("sys.argv", ["dma-diffusers", "bench", "attention", "--backward", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code or 0, *capsys.readouterr()


def test_the_command_writes_text_and_json(pretended, monkeypatch, capsys, tmp_path):
    chosen = ("--shape", "flux-1k", "-o", str(tmp_path / "out.json"))
    code, output, _ = command(monkeypatch, capsys, *chosen)
    assert code == 0 and "flux-1k 1×24×4608×128, normal inputs, H200" in output and "LOW int8" in output
    code, output, error = command(monkeypatch, capsys, *chosen, "--json")
    assert (code, error) == (0, "")
    result = json.loads(output)
    assert result["settings"]["passes"] == "backward"
    assert (
        [e["name"] for e in result["shapes"][SHAPE.label]["entries"]][1]
        == INT8.name
        == "LOW int8, backward int8"
    )


def test_a_chart_is_refused(pretended, monkeypatch, capsys):
    words = "error: --plot draws forward passes: leave it out with --backward\n"
    assert command(monkeypatch, capsys, "--plot", "out.svg") == (1, "", words)


@pytest.mark.kernel
def test_ours_and_a_peer_on_a_gpu():
    triton = pytest.importorskip("triton")
    if triton.knobs.runtime.interpret or not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    skipping = Config("bf16", "int8", policy="importance(budget=0.5, beyond=skip)")
    ways = [*bench.peers()[:1], *map(bench.of_config, (INT8, skipping))]
    (shape,) = parse(["1x8x1024x128"])
    cudnn, ours, half = bench.measure(shape, ways, current_gpu(), "normal", 0, 0.02)["entries"]
    assert max(cudnn["relative_l2"]) < 0.01 and max(ours["relative_l2"]) < 0.06
    assert half["skipped"] == 0.5 and ours["skipped"] == 0
    assert all(e["both"]["ms"] > 0 and e["backward"]["ms"] > 0 for e in (cudnn, ours, half))
