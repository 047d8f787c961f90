"""`dma-diffusers bench attention` as a user meets it, and what only a GPU can show of it."""

import json
import re
import sys
from xml.etree import ElementTree

import pytest
import torch

from dma_diffusers.cli import main
from dma_diffusers.eval.bench import attention as bench
from dma_diffusers.eval.bench import timing
from dma_diffusers.eval.bench.bound import current_gpu
from dma_diffusers.eval.bench.entries import Config
from dma_diffusers.eval.bench.inputs import draw
from dma_diffusers.eval.bench.shapes import parse
from dma_diffusers.kernels import operator
from dma_diffusers.kernels.lowerings import Choice
from tests.eval.test_bench import ENTRIES, H200, SHAPE, compared


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `bench attention`: exit status, standard output, standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dma-diffusers", "bench", "attention", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code or 0, *capsys.readouterr()

    return run


@pytest.fixture
def stored(monkeypatch):
    """A GPU that isn't there, on which everything has been measured."""

    def measured(shapes, configs, inputs, seed, seconds, output, command, on_step):
        settings = {"gpu": H200._asdict(), "configs": [config.name for config in configs]}
        return {
            "command": command,
            "settings": settings,
            "shapes": {SHAPE.label: {"entries": compared(SHAPE, ENTRIES)}},
        }

    monkeypatch.setattr(timing, "require_gpu", lambda: None)
    monkeypatch.setattr(bench, "bench_attention", measured)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("arguments", [(), ("--shape", "no-such-shape"), ("-o", "/no/such/folder/out.json")])
def test_without_a_gpu_that_is_what_is_said(command, arguments):
    assert command(*arguments) == (1, "", "error: this command needs a CUDA GPU, and there is none\n")


@pytest.mark.parametrize(("arguments", "words"), [
    (("--shape", "flux-8k"), "unknown shape 'flux-8k': choose from flux-1k, flux-2k"),
    (("--config", "high=fp3"), "fp3"),
    (("-o", "/no/such/folder/out.json"), "no folder"),
    (("--plot", "out.pdf"), r"ends in \.svg"),
    (("--plot", "/no/such/folder/out.svg"), "no folder"),
])  # fmt: skip
def test_bad_input_is_one_line(command, stored, arguments, words):
    code, output, error = command(*arguments)
    assert (code, output, error.count("\n")) == (1, "", 1)
    assert error.startswith("error: ") and re.search(words, error)


def test_the_table_on_a_terminal_and_the_chart(command, stored, tmp_path):
    code, output, _ = command("--plot", str(tmp_path / "plot.svg"))
    assert code == 0
    assert "flux-1k 1×24×4608×128, normal inputs, H200" in output
    assert re.search(r"LOW int8 +0\.250 +1044 +1\.60 +1\.20 +104", output)
    assert ElementTree.parse(tmp_path / "plot.svg").getroot().tag.endswith("svg")


def test_json_is_all_of_standard_output(command, stored):
    code, output, error = command("--json", "--config", "high=bf16,low=fp8")
    assert (code, error) == (0, "")
    result = json.loads(output)
    assert result["command"] == "dma-diffusers bench attention --json --config high=bf16,low=fp8"
    assert result["settings"]["configs"] == ["bf16|fp8, window 128, sink 128"]


@pytest.fixture
def gpu():
    triton = pytest.importorskip("triton")
    if triton.knobs.runtime.interpret or not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return current_gpu()


@pytest.fixture
def device(monkeypatch):
    """Where our kernels run: a GPU, or the CPU in Triton's interpreter."""
    triton = pytest.importorskip("triton")
    if triton.knobs.runtime.interpret:
        monkeypatch.setattr(operator, "choose", lambda *_: Choice("native", "the interpreter runs it"))
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU, or Triton's interpreter")
    return "cuda"


CONFIG = Config("bf16", "int8", window=0, sink=0)
NEIGHBORHOOD = Config("bf16", "int8", policy="neighborhood(window=4x8, stride=2x4)", grid=(10, 20))
IMPORTANCE = Config("bf16", "int8", policy="importance(budget=0.25)")


@pytest.mark.kernel
def test_inputs_do_not_fit_the_cache(gpu):
    copies = draw(*parse(["1x8x1024x128"]), "normal", 0, gpu.l2_bytes)
    assert sum(x.nbytes for copy in copies for x in copy) >= 8 * gpu.l2_bytes
    assert all(x.float().std() > 0.9 for copy in copies for x in copy)
    assert not torch.equal(copies[0][0], copies[1][0])


@pytest.mark.kernel
@pytest.mark.parametrize(
    "config", [CONFIG, NEIGHBORHOOD, IMPORTANCE], ids=["dense", "neighborhood", "importance"]
)
def test_the_kernel_alone_computes_what_the_call_does(device, config):
    """Here and in the interpreter: launched again, the recorded kernels write the same result anew."""
    copies = [tuple(torch.randn(3, 1, 2, 200, 64, device=device).bfloat16()) for _ in range(2)]
    prepared = config.entry.prepare(copies)
    for number in (0, 1, 2):
        expected = prepared.whole(number)
        again = prepared.kernel(number)
        assert torch.equal(again, expected)
        again.zero_()
        assert not prepared.quantise(number).any()
        assert torch.equal(prepared.kernel(number), expected)


@pytest.mark.kernel
def test_a_whole_run(gpu, tmp_path):
    output = tmp_path / "result.json"
    result = bench.bench_attention(parse(["1x8x1024x128"]), [CONFIG], seconds=0.05, output=output)
    assert json.loads(output.read_text()) == json.loads(json.dumps(result))
    entries = {entry["name"]: entry for entry in result["shapes"]["1×8×1024×128"]["entries"]}
    cudnn, ours = entries["cuDNN SDPA bf16"], entries["LOW int8"]
    assert cudnn["relative_l2"] < 0.005 < ours["relative_l2"] < 0.06
    assert 0 < ours["kernel"]["ms"] < ours["whole"]["ms"]
    assert 0 < cudnn["whole"]["share_of_bound"] < 1 and 0 < ours["kernel"]["share_of_bound"] < 1
    assert cudnn["peak_bytes"] >= 8 * 1024 * 128 * 2
    assert ours["whole"]["over_full"] == pytest.approx(cudnn["whole"]["ms"] / ours["whole"]["ms"])
