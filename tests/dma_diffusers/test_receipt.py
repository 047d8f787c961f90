"""Receipts, stored and read again."""

import json

import pytest

from dma_diffusers.receipt import ModuleReceipt, Receipt

RECEIPT = Receipt(
    (
        ModuleReceipt(
            "blocks.0.attn1", "native", "bf16", "int8/bf16", "dense(everywhere=low)", "asked for",
            3, {"fewer than 256 keys": 2}, "sm_90", 1, ("a note",),
            {"sigma>0.9: dense(everywhere=high)": 1, "dense(everywhere=low)": 2},
            0.0123, 1408, ("with int8 it was bad",),
        ),
        ModuleReceipt("blocks.0.attn2", "stock", reason="cross-attention"),
    )
)  # fmt: skip


def test_a_stored_receipt_says_the_same():
    stored = json.loads(json.dumps(RECEIPT.to_dict()))
    assert str(Receipt.from_dict(stored)) == str(RECEIPT)
    assert "bf16|int8/bf16 dense(everywhere=low), lowering native on sm_90: asked for" in str(RECEIPT)
    by_entry = "1 of sigma>0.9: dense(everywhere=high); 2 of dense(everywhere=low)"
    assert f"  3 calls intercepted: {by_entry}" in str(RECEIPT)
    assert "  relative error 0.012, estimated from 1,408 rows" in str(RECEIPT)
    assert "  guard: blocks.0.attn1: with int8 it was bad" in str(RECEIPT)
    assert "  2 calls fell back to stock: fewer than 256 keys" in str(RECEIPT)


@pytest.mark.parametrize("field, former", [("intercepted", "diverted"), ("fallbacks", "left")])
def test_receipts_of_former_results_are_read(field, former):
    stored = json.loads(json.dumps(RECEIPT.to_dict()))
    for module in stored["modules"]:
        module[former] = module.pop(field)
    stored["modules"][0]["unknown"] = 1
    assert str(Receipt.from_dict(stored)) == str(RECEIPT)


def test_receipts_from_before_schedules_say_what_was_dense():
    stored = json.loads(json.dumps(RECEIPT.to_dict()))
    for module in stored["modules"]:
        del module["by_entry"]
        module["in_dense_steps"] = 1 if module["intercepted"] else 0
    said = str(Receipt.from_dict(stored))
    assert "  3 calls intercepted: 1 of every tile HIGH for its noise level; 2 of the others" in said
    stored["modules"][0]["in_dense_steps"] = 0
    assert "  3 calls intercepted\n" in str(Receipt.from_dict(stored))
