"""Configurations as a user writes them."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from dma_diffusers.config import DMAConfig
from dma_diffusers.eval.quality.configurations import (
    AGAIN,
    ANOTHER_KERNEL,
    DEFAULT,
    FULL_PRECISION,
    named,
    parse,
    read,
    rows,
)


def test_text():
    assert parse("exact") == DMAConfig.preset("exact")
    assert parse("preset=b200,window=384") == DMAConfig.preset("b200", window=384)
    assert parse("low=nvfp4, protect_text=false, dense_layers=[0, -1], dense_above_sigma=0.9") == DMAConfig(
        low="nvfp4", protect_text=False, dense_layers=(0, -1), dense_above_sigma=0.9
    )


def test_policies_in_words():
    assert parse("policy=neighborhood(window=8x8)") == DMAConfig(policy="neighborhood(window=8x8)")
    assert parse(
        "preset=hopper, policy=neighborhood(window=9x8, high=3x3) | importance(budget=.05),dense_layers=[0,-1]"
    ) == DMAConfig.preset(
        "hopper", policy="neighborhood(window=9x8, high=3x3) | importance(budget=0.05)", dense_layers=(0, -1)
    )
    assert parse("text=first,grid=12x25") == DMAConfig(text="first", grid=(12, 25))


def test_schedules_in_words():
    entries = "sigma>0.9: dense(); sigma>0.5: importance(budget=.15) high=bf16 ; low=int8/bf16"
    expected = DMAConfig.preset(
        "hopper", policy="neighborhood(window=9x8, high=3x3)", schedule=entries, text="first"
    )
    policy = "policy=neighborhood(window=9x8, high=3x3)"
    assert parse(f"preset=hopper,schedule={entries},{policy}, text=first") == expected
    assert parse(f"{policy},text=first,preset=hopper, schedule= {entries}") == expected


def test_yaml(tmp_path):
    path = tmp_path / "configs.yaml"
    path.write_text(
        "near: low=mxfp4,window=384\nstock: exact\nwide:\n  preset: b200\n  window: 640\n"
        "grid:\n  policy: neighborhood(window=9x8, high=3x3)\n"
        "words: {schedule: 'sigma>0.9: dense(); low=int8'}\npairs: {schedule: [[0.9, dense()], [0, {low: int8}]]}\n"
    )
    assert read(path) == {
        "words": DMAConfig(schedule="sigma>0.9: dense(); low=int8"),
        "pairs": DMAConfig(schedule="sigma>0.9: dense(); low=int8"),
        "grid": DMAConfig(policy="neighborhood(window=9x8, high=3x3)"),
        "near": DMAConfig(low="mxfp4", window=384),
        "stock": DMAConfig.preset("exact"),
        "wide": DMAConfig.preset("b200", window=640),
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "give a preset"),
        ("mxfp4", "give a preset"),
        ("low=", "give a preset"),
        ("low=[", "give a preset"),
        ("low=mxfp5", "mxfp5"),
        ("window=-1", "window must be"),
        ("windows=3", "unknown option windows"),
        ("preset=b300", "unknown preset"),
        ("policy=neighbourhood(window=8x8)", "is no policy"),
        ("policy=dense(),window=384", "leave them out"),
        ("policy=absent.json", "there is no policy file absent.json"),
        ("policy=dense(),quality=0.5", "quality chooses from a policy file"),
        ("preset=exact,window=0", "takes no window"),
        ("schedule=sigma>0.5: dense();sigma>0.9: dense();dense()", "sigma>0.9 stands after sigma>0.5"),
        ("schedule=sigma>0.5: dense()", "nothing holds from sigma 0.5 down to 0"),
        ("schedule=dense(),policy=dense()", "every entry of the schedule has a policy"),
    ],
)
def test_bad_text_is_one_clear_line(text, message):
    with pytest.raises(ValueError) as refused:
        parse(text)
    assert message in str(refused.value) and repr(text) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", [b"", b"[1]", b"a: [", b"\xff", b"a: 3", b"a:"])
def test_bad_yaml_is_one_clear_line(tmp_path, content):
    path = tmp_path / "configs.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError) as refused:
        read(path)
    assert "configs.yaml" in str(refused.value) and "\n" not in str(refused.value)


def test_names_are_unique():
    with pytest.raises(ValueError, match="'exact' is given twice"):
        named(["exact", "low=int8", "exact"])
    with pytest.raises(ValueError, match="'full precision': that row is always there"):
        rows({"full precision": DMAConfig()})


def test_the_noise_floor_takes_another_exact_kernel():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 300, 64)
    exact = scaled_dot_product_attention(*(x.double() for x in (q, k, v)))
    found = {}
    for row in (FULL_PRECISION, AGAIN, ANOTHER_KERNEL):
        with row.kernels():
            found[row.name] = scaled_dot_product_attention(q, k, v)
        torch.testing.assert_close(found[row.name].double(), exact, rtol=1e-5, atol=1e-5)
    assert torch.equal(found[FULL_PRECISION.name], found[AGAIN.name])
    assert not torch.equal(found[FULL_PRECISION.name], found[ANOTHER_KERNEL.name])


def test_the_default_rows():
    assert len(DEFAULT) == 6
    names = [row.name for row in rows(DEFAULT)]
    assert names[:2] == [AGAIN.name, ANOTHER_KERNEL.name] and names[2:] == list(DEFAULT)
