"""The doctor's word on memory: what a call allocates beside its tensors."""

import json

import pytest
import torch

pytest.importorskip("triton")

import triton

from dma_diffusers import doctor
from dma_diffusers.kernels.attention import launch
from dma_diffusers.kernels.attention.memory import workspace_bytes
from dma_diffusers.kernels.call import Call
from dma_diffusers.kernels.device.launch import Launcher
from dma_diffusers.kernels.plan import make
from dma_diffusers.kernels.precision import Precisions
from dma_diffusers.kernels.quantiser import launch as quantiser
from dma_diffusers.kernels.tiling.layout import Layout
from dma_diffusers.kernels.tiling.policies import Dense, Diagonal
from dma_diffusers.kernels.tiling.precision_map import Class
from tests.command_line import run

MIB = 2**20
FLUX = (1, 24, 4608, 128)


def said(size, high, low, lowering="native", target="sm_90", **options) -> float:
    """In MiB."""
    return workspace_bytes(size, Precisions.parse(high, low), lowering, target, **options) / MIB


class Counting(Launcher):
    """Launches nothing, and adds up what kernels would write."""

    def __init__(self):
        super().__init__(lambda *_, **__: None)
        self.bytes = 0

    def empty(self, shape, dtype, device):
        x = super().empty(shape, dtype, device)
        self.bytes += x.nbytes
        return x


@pytest.mark.parametrize(
    ("high", "low", "lowering", "target", "policy"),
    [
        ("bf16", "int8", "native", "sm_90", Diagonal()), ("bf16", "fp8/bf16", "native", "sm_90", Diagonal()),
        ("mxfp8", "mxfp4", "native", "sm_100", Diagonal()), ("mxfp8", "mxfp4", "faithful", "sm_90", Diagonal()),
        ("mxfp8", "mxfp4", "native", "sm_100", Dense(Class.MEAN)),
        ("bf16", "int8", "native", "sm_90", Dense(Class.MEAN)),
    ],
)  # fmt: skip
def test_it_is_what_the_kernels_write(high, low, lowering, target, policy, monkeypatch):
    for module in (launch, quantiser):  # as many as memory is counted for
        monkeypatch.setattr(module, "multiprocessors", lambda device: 132)
    q, k, v = (torch.zeros(2, 300, 3, 64, dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
    plan, launcher = make(policy, Layout(300, 300)), Counting()
    launch.attention(
        Call(q, k, v), plan, Precisions.parse(high, low),
        lowering=lowering, return_lse=False, target=target, launcher=launcher,
    )  # fmt: skip
    counted = said((2, 3, 300, 64), high, low, lowering, target, policy=policy) * MIB
    assert launcher.bytes <= counted <= launcher.bytes + 4096  # counters, block lists


def test_the_size_of_flux():
    q = 24 * 4608 * 128 / MIB  # bytes of q in one byte a number
    statistics = 7 * 24 * 8 * 128 * 4 / MIB  # of K and V, in 8 chunks of each head
    of_rows = 2 * 24 * 4608 * 4 / MIB  # q's scales, and what K's mean adds to its scores
    kept = 3 * q + statistics + of_rows  # q and k in int8, v in e4m3
    assert said(FLUX, "bf16", "int8") == pytest.approx(kept, rel=0.01)
    assert said(FLUX, "bf16", "int8/bf16") == pytest.approx(kept - q, rel=0.01)
    scales = q / 32
    both = 2 * (1 + 0.5) * q + 2 * 2 * scales + q
    assert said(FLUX, "mxfp8", "mxfp4", target="sm_100") == pytest.approx(both, rel=0.02)
    pieces = 2 * 48 * 192 * (128 + 2) * 4 / MIB  # sums of the last 48 programs, which are split in two
    assert said(FLUX, "bf16", "int8", policy=Dense(Class.HIGH)) == pytest.approx(pieces, abs=0.1)
    assert said((2, *FLUX[1:]), "bf16", "int8") == pytest.approx(2 * said(FLUX, "bf16", "int8"), rel=0.01)
    copies = said(FLUX, "bf16", "int8", dtype=torch.float32) - said(FLUX, "bf16", "int8")
    assert copies == pytest.approx(3 * 2 * q, rel=0.01)  # bf16 copies of q, k and v


def test_means_take_little():
    """In bf16, means take a 16th of k and v; in float32 twice that, and room for their encoded numbers."""
    q, policy = 24 * 4608 * 128 / MIB, Dense(Class.MEAN)
    assert said(FLUX, "bf16", "int8", policy=policy) == pytest.approx(2 * 2 * q / 32, rel=0.01)
    low, means = (
        said(FLUX, "int8/fp8", "int8", target="sm_89", policy=Dense(everywhere))
        for everywhere in (Class.LOW, Class.MEAN)
    )
    encoded = 2 * 24 * 256 * 128 / MIB  # in whole tiles
    assert means == pytest.approx(low + 2 * 4 * q / 32 + encoded, abs=0.1)


def test_a_tensor_scale_takes_float32_copies_on_the_way():
    q = 24 * 4608 * 128 * 4 / MIB
    assert 3 * q < said(FLUX, "mxfp8", "nvfp4", target="sm_100") < 6 * q


@pytest.mark.parametrize("words", ["24x4608x128", "1×24×4608×128"])
def test_doctor_says_it(monkeypatch, capsys, words):
    monkeypatch.setattr(doctor, "architecture", lambda device: "sm_90")
    code, output, _ = run(monkeypatch, capsys, "doctor", "--shape", words, "--json")
    rows = {(row["formats"], row["name"]): row for row in json.loads(output)["lowerings"]}
    assert code == 0
    assert rows["bf16|int8", "native"]["extra_bytes"] == said(FLUX, "bf16", "int8") * MIB
    assert rows["mxfp8|mxfp4", "native"]["extra_bytes"] is None  # it can't run here
    assert rows["mxfp8|mxfp4", "reference"]["extra_bytes"] is None
    _, output, _ = run(monkeypatch, capsys, "doctor", "--shape", words)
    assert "extra MiB" in output and f" {said(FLUX, 'bf16', 'int8'):.1f} " in output


@pytest.mark.parametrize("words", ["24x4608", "1x2x3x4x5", "0x300x64", "a"])
def test_doctor_refuses_other_shapes(monkeypatch, capsys, words):
    code, _, error = run(monkeypatch, capsys, "doctor", "--shape", words)
    assert code == 1
    assert error == (
        f"error: a shape is heads, tokens and head_dim, perhaps after a batch, such as 24x4608x128, got '{words}'\n"
    )


@pytest.mark.kernel
@pytest.mark.parametrize(("high", "low"), [("bf16", "int8"), ("mxfp8", "mxfp4")])
def test_on_a_gpu_it_is_what_a_call_takes(high, low):
    if triton.knobs.runtime.interpret or not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    from dma_diffusers.kernels import operator
    from dma_diffusers.kernels.lowerings import architecture

    device = torch.device("cuda")
    q, k, v = (torch.randn(1, 4608, 24, 128, device=device).bfloat16().transpose(1, 2) for _ in range(3))
    lowering = operator.choose(device, 128, high, low).lowering
    expected = said(FLUX, high, low, lowering, architecture(device)) * MIB
    for _ in range(3):  # at first kernel by kernel, and then recorded
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = operator.attention(q, k, v, high=high, low=low).out
        taken = torch.cuda.max_memory_allocated() - before - out.nbytes
        assert taken == pytest.approx(expected, rel=0.1)
        del out
