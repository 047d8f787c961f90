"""A call's losses in a format are those of numpy in float64; rotations and means leave the exact output alone."""

import math

import numpy as np
import pytest
import torch

from dma_diffusers.eval.recordings.store import Recording, Tensors
from dma_diffusers.eval.study.attention import calls, crests, measure
from dma_diffusers.eval.study.options import UNSIGNED, Options, Variant
from dma_diffusers.kernels.formats import FORMATS, fake_quantize, rotate
from tests.eval.recordings.folders import random_tensors


def recording(tensors: Tensors, is_causal: bool = False, scale: float | None = None) -> Recording:
    shape = tuple(tensors.q.shape)
    return Recording(0, 0, 0, "attn", 1.0, shape, (0, 0), scale, is_causal, "", 0)


def softmax(q: np.ndarray, k: np.ndarray, scale: float, hidden: np.ndarray | None) -> np.ndarray:
    scores = q @ np.swapaxes(k, -1, -2) * scale
    if hidden is not None:
        scores = np.where(hidden, -np.inf, scores)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("rotation", ["none", "hadamard16"])
@pytest.mark.parametrize("smooth", [False, True])
def test_errors_of_q_and_k(is_causal, rotation, smooth):
    """Heads share keys, a mask hides some, the scale is not the usual one."""
    tensors = random_tensors(0, 150, heads=4, kv_heads=2, batch=2, masked=True)
    scale, format = 0.3, "mxfp4"
    whole = list(calls(recording(tensors, is_causal, scale), tensors, seed=0))
    assert len(whole) == 2
    for entry, call in enumerate(whole):
        seen, rows = tensors.key_mask[entry].numpy(), call.rows.numpy()
        q = tensors.q[entry] * (scale * math.log2(math.e))
        k, v = (x[entry, :, tensors.key_mask[entry]] for x in (tensors.k, tensors.v))
        places = np.arange(150)[seen]
        hidden = (places[None] > rows[:, None]) if is_causal else None
        rounded_q = fake_quantize(rotate(q, rotation), format).double().numpy()
        rounded_k = (
            fake_quantize(rotate(k - k.mean(1, keepdim=True) * smooth, rotation), format).double().numpy()
        )
        q, k, v = (x.double().numpy() for x in (q, k, v))
        exact, out = (
            np.stack(
                [softmax(a[h][rows], b[h // 2], math.log(2), hidden) @ v[h // 2] for h in range(4)]
            )
            for a, b in ((q, k), (rounded_q, rounded_k))
        )  # fmt: skip
        found = measure(call, Options((format,), ("none", "hadamard16")))
        expected = np.linalg.norm(out - exact) / np.linalg.norm(exact)
        assert found[Variant("qk", format, rotation, smooth)].relative_l2 == pytest.approx(expected, rel=1e-3)
        if not is_causal:
            assert len(rows) == 150


def test_errors_of_p_and_v():
    tensors = random_tensors(1, 100)
    call = next(calls(recording(tensors), tensors, seed=0))
    q, k, v = (x[0].double().numpy() for x in tensors[:3])
    p = softmax(q, k, 32**-0.5, None)
    top = p / p.max(-1, keepdims=True)
    found = measure(call, Options(("int8", "mxint8"), ("none", "hadamard32")))

    def error(out: np.ndarray) -> float:
        return np.linalg.norm(out - p @ v) / np.linalg.norm(p @ v)

    for name, steps in (("int8", 127), ("uint8", 255)):
        codes = np.rint(top * steps)
        expected = error(codes @ v / codes.sum(-1, keepdims=True))
        assert found[Variant("p", name)].relative_l2 == pytest.approx(expected, rel=2e-3)
    for smooth in (False, True):
        mean = v.mean(1, keepdims=True) * smooth
        scale = np.abs(v - mean).max(1, keepdims=True) / 127  # a channel's, over all keys
        expected = error(p @ (np.rint((v - mean) / scale) * scale) + mean)
        assert found[Variant("v", "int8", "none", smooth)].relative_l2 == pytest.approx(expected, rel=2e-3)


def test_a_rotation_that_is_shared_changes_no_exact_number():
    """Eight bits lose little, whatever is rotated and subtracted before them, and undone after."""
    tensors = random_tensors(2, 64)
    call = next(calls(recording(tensors), tensors, seed=0))
    found = measure(call, Options(("int8",)))
    of_qk = {v: s.relative_l2 for v, s in found.items() if v.part in ("qk", "v")}
    assert {variant.rotation for variant in of_qk} == {"none", "hadamard16", "hadamard32", "head_dim"}
    assert max(of_qk.values()) < 0.03


def test_outliers_in_one_channel_are_cured_by_rotation():
    tensors = random_tensors(3, 256)
    tensors.k[..., 5] *= 30
    found = measure(next(calls(recording(tensors), tensors, seed=0)), Options(("mxint8", "mxfp8")))
    of_k = {(v.format, v.rotation): s.qsnr for v, s in found.items() if v.part == "k" and v.smooth}
    assert of_k["mxint8", "hadamard32"] > of_k["mxint8", "none"] + 6  # theory: 20 log10 of κ, √32 to 2.5
    assert abs(of_k["mxfp8", "hadamard32"] - of_k["mxfp8", "none"]) < 1.5
    plain, rotated = (found[Variant("qk", "mxint8", r, True)].relative_l2 for r in ("none", "hadamard32"))
    assert rotated < 0.6 * plain
    quantiles = crests(next(calls(recording(tensors), tensors, seed=0)), Options())
    assert quantiles["k", 32, "none", True][2] > 1.7 * quantiles["k", 32, "hadamard32", True][2]


def test_unsigned_integers_have_twice_the_levels():
    x = torch.rand(64, 64, generator=torch.Generator().manual_seed(0))
    for signed, format in UNSIGNED.items():
        assert format.bits == FORMATS[signed].bits and format.block == FORMATS[signed].block
        errors = [(fake_quantize(x, each) - x).square().mean() for each in (signed, format)]
        assert 3 < errors[0] / errors[1] < 6
        assert len(fake_quantize(x[:1, : format.block], format).unique()) <= 2**format.bits


@pytest.mark.parametrize(("given", "message"), [
    ({"formats": ("mxfp5",)}, "unknown format 'mxfp5'"),
    ({"formats": ("bf16",)}, "compares other formats with bf16"),
    ({"rotations": ("hadamard64",)}, "unknown rotation 'hadamard64'"),
])  # fmt: skip
def test_unknown_options(given, message):
    with pytest.raises(ValueError, match=message):
        Options(**given)


def test_rotations_that_fit():
    assert Options().of_head_dim(96) == ["none", "hadamard16", "hadamard32"]
    with pytest.raises(ValueError, match="head_dim is 72"):
        Options(rotations=("hadamard16",)).of_head_dim(72)


def test_pairs_round_everything():
    """Q·K in one format and P·V in another, K less its mean; the probabilities of integers are unsigned."""
    tensors = random_tensors(4, 90)
    call = next(calls(recording(tensors), tensors, seed=0))
    q, k, v = (x[0].double().numpy() for x in tensors[:3])
    k = k - k.mean(1, keepdims=True)
    exact = softmax(q, k, 32**-0.5, None) @ v
    rounded_q = fake_quantize(call.q, "mxfp8").double().numpy()
    rounded_k = fake_quantize(torch.from_numpy(k), "mxfp8").numpy()
    p = softmax(rounded_q, rounded_k, math.log(2), None)
    codes = np.rint(p / p.max(-1, keepdims=True) * 255)
    scale = np.abs(v).max(1, keepdims=True) / 127
    out = codes @ (np.rint(v / scale) * scale) / codes.sum(-1, keepdims=True)
    found = measure(call, Options(("mxfp8", "int8"), ("none",)))
    expected = np.linalg.norm(out - exact) / np.linalg.norm(exact)
    assert found[Variant("pair", "mxfp8/int8", smooth=True)].relative_l2 == pytest.approx(expected, rel=2e-3)
