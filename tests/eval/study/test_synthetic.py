"""The theory against published figures and against the codecs, and the bias of integers that reach −128."""

import json
import math

import numpy as np
import pytest
import torch

from dma_diffusers.eval.study.blocks import crest_quantiles, sums
from dma_diffusers.eval.study.synthetic import bias, document
from dma_diffusers.eval.study.theory import noise
from dma_diffusers.kernels.formats import FORMATS, fake_quantize
from tests.command_line import run

PUBLISHED = {
    "mxfp8": 31.52, "mxfp6_e2m3": 30.96, "mxint8": 41.61, "mxint4": 16.84, "mxfp4": 18.76, "nvfp4": 20.43,
    "nvint4": 21.28,
}  # fmt: skip
CROSSOVERS = {"mx8": (7.55, 0.02), "mx6": (1.96, 0.02), "mx4": (2.04, 0.02), "nv4": (2.39, 0.1)}
WITH_ELEMENTS = [name for name, format in FORMATS.items() if format.element]


@pytest.fixture(scope="module")
def found():
    return document(seed=1)


def test_published_crossovers(found):
    assert found["crossovers"].keys() == CROSSOVERS.keys()
    for name, (crest, within) in CROSSOVERS.items():
        assert found["crossovers"][name] == pytest.approx(crest, abs=within)


def test_published_qsnr_of_gaussian_numbers(found):
    assert list(found["gaussian_qsnr_db"]) == WITH_ELEMENTS
    for name, qsnr in PUBLISHED.items():
        assert found["gaussian_qsnr_db"][name] == pytest.approx(qsnr, abs=0.1)


@pytest.mark.parametrize("name", WITH_ELEMENTS)
def test_theory_predicts_gaussian_numbers(name, found):
    within = 0.02 if "int" in name and name != "nvint4" else 0.5
    assert found["predicted_qsnr_db"][name] == pytest.approx(found["gaussian_qsnr_db"][name], abs=within)


def test_minus_128_is_a_bias_of_bf16_scales_and_ours_has_none(found):
    assert found["int8_bias"]["asymmetric"] >= 0.1  # 16.8 % is published
    assert found["int8_bias"]["symmetric"] == found["int8_bias"]["codecs"] == 0


def test_the_bias_pulls_the_mean_down():
    x = torch.randn(2048, 128, generator=torch.Generator().manual_seed(0))
    x = torch.cat((x, -x))  # has a mean of zero
    assert bias(x).asymmetric >= 0.1
    blocks = x.bfloat16()
    scale = (blocks.float().abs().amax(-1, keepdim=True) / 127).bfloat16()
    codes = (blocks / scale).float().round()
    assert codes.clamp(-128, 127).sum() < -500
    assert codes.clamp(-127, 127).sum() == 0


@pytest.mark.parametrize("name", ["mxfp4", "nvint4", "fp8", "int8_tile"])
def test_sums_are_those_of_the_whole_tensor(name):
    x = torch.randn(3, 200, 40, generator=torch.Generator().manual_seed(2)) * torch.logspace(-2, 2, 40)
    x[0, 0] = 0
    found, exact = sums(x, FORMATS[name]), x.double().numpy()
    error = ((fake_quantize(x, name).double().numpy() - exact) ** 2).sum()
    assert found.norm == pytest.approx((exact**2).sum())
    assert found.qsnr == pytest.approx(-10 * np.log10(error / (exact**2).sum()), abs=1e-4)
    assert found.relative_l2 is None


def test_crest_factors_of_blocks():
    x = torch.zeros(5, 64)
    x[0, 3], x[1], x[2, 32:] = 7.0, -2.0, 1.0  # one number alone, and three blocks of one magnitude
    assert crest_quantiles(x, 32) == pytest.approx(
        np.quantile([32**0.5, 1, 1, 1], [0.05, 0.25, 0.5, 0.75, 0.95])
    )
    assert crest_quantiles(x[:1], 64)[2] == pytest.approx(8)


def test_integers_err_uniformly_within_a_step():
    crest = torch.tensor(2.0, dtype=torch.float64)
    step = 2 / 127
    assert noise(FORMATS["int8"], crest, 64).item() == pytest.approx(step**2 / 12 * 63 / 64)
    assert noise(FORMATS["mxint8"], crest, 32, 1.0).item() == pytest.approx(step**2 / 12)
    assert noise(FORMATS["mxint8"], crest, 32).item() == pytest.approx(1.5**2 * step**2 / 12)
    with pytest.raises(ValueError, match="bf16 has no elements"):
        noise(FORMATS["bf16"], crest, 32)


def test_the_command(monkeypatch, capsys):
    status, output, error = run(monkeypatch, capsys, "study", "--synthetic", "--json")
    found = json.loads(output)
    assert (status, error) == (0, "")
    assert found["crossovers"].keys() == CROSSOVERS.keys()
    assert found["gaussian_qsnr_db"].keys() == set(WITH_ELEMENTS)
    status, output, _ = run(monkeypatch, capsys, "study", "--synthetic")
    assert status == 0 and "mx8 7.54, mx6 1.96, mx4 2.04, nv4 2.46" in output
    share = math.floor(1000 * found["int8_bias"]["asymmetric"] + 0.5) / 10
    assert f"stores -128 in {share}%; clipped to ±127, in 0.0%; our formats, in 0.0%" in output


def test_blocks_that_are_not_whole_count_what_is_there():
    """20 rows of a tile of 128, and 40 columns in blocks of 32: nothing is padded with zeros that count."""
    x = torch.randn(20, 40, generator=torch.Generator().manual_seed(3))
    for name in ("int8_tile", "mxint8"):
        found = sums(x, FORMATS[name])
        assert found.predicted_qsnr == pytest.approx(found.qsnr, abs=0.3)
