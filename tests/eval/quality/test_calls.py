"""A row's receipt says how many of its calls ran at low precision, and a reader is told where not all did."""

import pytest

from dma_diffusers import DMAConfig, apply, report
from dma_diffusers.eval.quality.calls import remarks_on, share_that_ran, shares_that_ran
from dma_diffusers.fingerprint import OTHER_WEIGHTS
from tests import tiny_pipelines
from tests.tiny_pipelines import draw


def receipt_of(config: DMAConfig, make=tiny_pipelines.flux) -> dict:
    pipe = make()
    apply(pipe, config)
    draw(pipe)
    return report(pipe).to_dict()


def module(name: str, intercepted: int, fallbacks: int, **fields) -> dict:
    left = {"too short": fallbacks} if fallbacks else {}
    return {"module": name, "policy": "dense()", "intercepted": intercepted, "fallbacks": left} | fields


@pytest.mark.parametrize(("config", "reason"), [
    (DMAConfig.preset("auto"), "nothing is faster than stock: native: cpu has no block-scaled MMA"),
    (DMAConfig.preset("exact"), "exact: nothing is quantised"),
    (DMAConfig(min_length=10_000), "fewer than 10000 keys"),
])  # fmt: skip
def test_a_row_of_which_nothing_ran(config, reason):
    receipt = receipt_of(config)
    assert share_that_ran(receipt) == 0 and set(shares_that_ran(receipt).values()) == {0}
    (remark,) = remarks_on("row", receipt, None)
    assert remark.startswith(f"row: no attention calls ran at low precision ({reason}")
    assert remark.endswith("the row shows full precision")
    assert "linear layers alone are low-bit" in remarks_on("row", receipt, "fp8")[0]


def test_a_row_of_which_everything_ran():
    receipt = receipt_of(DMAConfig(min_length=0))
    assert share_that_ran(receipt) == 1 and not remarks_on("row", receipt, None)


def test_modules_that_always_keep_stock_do_not_count():
    """In Wan these are the modules of cross-attention, half of all."""
    receipt = receipt_of(DMAConfig(min_length=0), tiny_pipelines.wan)
    assert any(each["policy"] is None for each in receipt["modules"])
    assert share_that_ran(receipt) == 1 and not any("attn2" in name for name in shares_that_ran(receipt))


def test_shares_are_of_calls_and_transformers_count_together():
    receipt = {
        "modules": [
            module("transformer.a.attn", 3, 1),
            module("transformer_2.a.attn", 0, 4),
            module("transformer.b.attn", 4, 0),
            module("transformer.c.attn", 0, 0),
            module("transformer.d.attn", 0, 9, policy=None),
        ]
    }
    assert shares_that_ran(receipt) == {"a.attn": 3 / 8, "b.attn": 1}
    assert share_that_ran(receipt) == 7 / 12
    assert remarks_on("row", receipt, None) == [
        "row: 58% of its attention calls ran at low precision (too short)"
    ]


def test_nothing_is_said_of_calls_that_nobody_counted():
    for receipt in (None, {"modules": []}, {"modules": [module("transformer.a.attn", 0, 0)]}):
        assert share_that_ran(receipt) is None and not remarks_on("row", receipt, None)


def test_a_policy_for_other_weights_is_told():
    receipt = {"modules": [module("transformer.a.attn", 1, 0, notes=(OTHER_WEIGHTS,))] * 2}
    assert remarks_on("row", receipt, None) == [f"row: {OTHER_WEIGHTS}"]
