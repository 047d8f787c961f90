"""The benchmark's peers: how they are found, told apart and called, with stand-ins for what isn't installed."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from dma_diffusers.eval.bench.cudnn_fp8 import cudnn_fp8
from dma_diffusers.eval.bench.peers import PEERS

Q, K, V = (torch.full((1, 2, 5, 4), value) for value in (1.0, 2.0, 3.0))


def sage(calls, **functions):
    def attend(q, k, v, **options):
        calls.append((q.shape, options))
        return v

    return SimpleNamespace(__name__="fake", sageattn=attend, **{name: attend for name in functions})


def peer(name):
    return next(peer for peer in PEERS if peer.name == name)


def test_two_versions_of_one_package_are_told_apart(monkeypatch):
    first, second = sage([]), sage([], sageattn_qk_int8_pv_fp8_cuda_sm90=True)
    monkeypatch.setitem(sys.modules, "sageattention", second)
    monkeypatch.setitem(sys.modules, "sageattention1", None)
    assert peer("SageAttention 2").load() is second
    with pytest.raises(ImportError, match="sageattention is another version; "):
        peer("SageAttention 1").load()
    assert peer("SageAttention 1").version.startswith("absent: sageattention is another version")
    monkeypatch.setitem(sys.modules, "sageattention1", first)
    assert peer("SageAttention 1").load() is first
    assert peer("SageAttention 1").version == "fake, whose version isn't told"


def test_a_peer_that_breaks_on_import_is_absent(monkeypatch, tmp_path):
    (tmp_path / "sageattention2.py").write_text("raise AssertionError('built for another torch\\nand more')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "sageattention", None)
    with pytest.raises(ImportError, match=r"built for another torch$"):
        peer("SageAttention 2").entry.prepare([(Q, K, V)])


@pytest.mark.parametrize("capability", [(9, 0), (8, 9)])
def test_peers_are_called_in_their_layout(monkeypatch, capability):
    calls = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    module = sage(calls, sageattn_qk_int8_pv_fp8_cuda_sm90=True)
    module.sageattn = None if capability == (9, 0) else module.sageattn
    monkeypatch.setitem(sys.modules, "sageattention", module)
    prepared = peer("SageAttention 2").entry.prepare([(Q, K, V), (V, K, Q)])
    assert [prepared.whole(number)[0, 0, 0, 0] for number in range(3)] == [3, 1, 3]
    assert calls[0] == (Q.shape, {"tensor_layout": "HND", "is_causal": False})
    assert (prepared.kernel, prepared.quantise) == (None, None)

    def flash(q, k, v, causal):
        assert q.shape == (1, 5, 2, 4) and not causal
        return v, None

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(__path__=[]))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", SimpleNamespace(flash_attn_func=flash))
    assert torch.equal(peer("FlashAttention-4 bf16").entry.prepare([(Q, K, V)]).whole(0), V)


def flash_attention_3(calls):
    """FlashAttention-3's interface, computed in float64 of what it is given."""

    def attend(q, k, v, **descales):
        assert q.shape == (1, 300, 2, 64)
        calls.append(q.dtype)
        scales = [descales.get(f"{name}_descale", torch.ones(1, 2)) for name in "qkv"]
        assert all(scale.shape == (1, 2) and scale.dtype == torch.float32 for scale in scales)
        q, k, v = (
            (x.double() * scale[:, None, :, None]).transpose(1, 2)
            for x, scale in zip((q, k, v), scales, strict=True)
        )
        return F.scaled_dot_product_attention(q, k, v).bfloat16().transpose(1, 2)

    return attend


@pytest.mark.parametrize("module", ["fa3_fwd_interface", "flash_attn_interface"])
def test_flash_attention_3_takes_bf16_and_e4m3(monkeypatch, module):
    """Heads of very different sizes: one scale for all of them would lose the smaller's numbers."""
    calls = []
    fake = SimpleNamespace(__name__=module, flash_attn_func=flash_attention_3(calls))
    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", None)
    monkeypatch.setitem(sys.modules, module, fake)
    q, k, v = torch.randn(3, 1, 2, 300, 64, generator=torch.Generator().manual_seed(0))
    v = v * torch.tensor([1.0, 1e-5])[:, None, None]
    copies = [tuple(x.bfloat16() for x in (q, k, v)), tuple(x.bfloat16() for x in (k, q, v))]
    for name, most in (("FlashAttention-3 bf16", 1e-2), ("FlashAttention-3 FP8", 0.08)):
        prepared = peer(name).entry.prepare(copies)
        for number in range(3):
            exact = F.scaled_dot_product_attention(*(x.double() for x in copies[number % 2]))
            found = prepared.whole(number)
            error = (found - exact).norm(dim=(2, 3)) / exact.norm(dim=(2, 3))
            assert found.dtype == torch.bfloat16 and (error < most).all()
            if prepared.kernel:
                assert torch.equal(prepared.kernel(number), found)
    assert (prepared.kernel, prepared.quantise) != (None, None)
    assert calls == [torch.bfloat16] * 3 + [torch.float8_e4m3fn] * 6


class Graph:
    """cuDNN's FP8 attention as its frontend builds it, computed by torch."""

    class Tensor:
        def __init__(self, name, **attributes):
            self.name = name

        def __getattr__(self, name):  # set_output, set_dim …
            return lambda value: self

    def __init__(self, **types):
        self.tensor, self.built = Graph.Tensor, False

    def sdpa_fp8(self, is_inference, attn_scale, **tensors):
        assert is_inference and all(name == tensor.name for name, tensor in tensors.items())
        self.scale = attn_scale
        return tuple(map(Graph.Tensor, ("o", "stats", "amax_s", "amax_o")))

    def build(self, modes):
        self.built = modes == ["A", "fallback"]

    def get_workspace_size(self):
        return 16

    def execute(self, tensors, workspace):
        assert self.built and workspace.numel() == 16
        given = {tensor.name: x for tensor, x in tensors.items()}
        q, k, v = (given[x].float() * given[f"descale_{x}"] for x in "qkv")
        p = (q @ k.mT * self.scale).softmax(-1)
        p = (p * given["scale_s"]).to(torch.float8_e4m3fn).float() * given["descale_s"]
        given["o"].copy_((p @ v * given["scale_o"]).to(torch.float8_e4m3fn))


@pytest.mark.parametrize("size", [0.01, 1.0, 40.0])
def test_cudnn_fp8_fills_its_formats(size):
    cudnn = ModuleType("cudnn")
    cudnn.pygraph = Graph
    cudnn.data_type = SimpleNamespace(FP8_E4M3="e4m3", FLOAT="float")
    cudnn.heur_mode = SimpleNamespace(A="A", FALLBACK="fallback")
    q, k, v = torch.randn(3, 1, 2, 300, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = cudnn_fp8(cudnn, q, k, v * size)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), (v * size).double())
    assert found.dtype == torch.bfloat16
    assert ((found - exact).norm() / exact.norm()).item() < 0.08
