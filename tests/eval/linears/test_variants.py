"""MicroMix is compared with the same widths in another order of channels; summaries are checked by hand."""

import pytest
import torch
import yaml

from dma_diffusers.eval.linears import synthetic
from dma_diffusers.eval.linears.rows import Rows, draw_sampled
from dma_diffusers.eval.linears.variants import ORDERS, measure, reorder, rows_of, summary, table
from dma_diffusers.eval.quality.configurations import read
from dma_diffusers.linears.files import read_header
from dma_diffusers.linears.quantise import attachment_of, calibrate_linears
from dma_diffusers.pipelines.load import load_pipeline, recommended_call


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder, pipe = tmp_path_factory.mktemp("variants"), load_pipeline()
    call = recommended_call() | {"num_inference_steps": 2, "height": 64, "width": 64}
    rows = Rows()
    draw_sampled(pipe, ["a cat", "a red apple"], [0, 1], call, rows, lambda *_: None)
    seen = calibrate_linears(pipe, ["two dogs"], call=call, progress=False)
    before = {name: each.total.clone() for name, each in seen["transformer."].inputs.items()}
    found = measure(pipe, seen, rows, 5.0, folder)
    assert all(each.total.equal(before[name]) for name, each in seen["transformer."].inputs.items())
    assert attachment_of(pipe.transformer) is None
    return folder, found


def test_sorted_channels_err_least_at_the_same_bits(measured):
    _, found = measured
    summed = summary(found)
    assert summed["micromix"]["bits"] == summed["random"]["bits"] == summed["unsorted"]["bits"] <= 5
    assert summed["mxfp4"]["bits"] == 4.25 and summed["mxfp8"]["bits"] == 8.25
    for name in ("random", "unsorted", "mxfp4"):
        assert summed[name]["over_micromix"]["estimate"] > 1.1
        assert summed[name]["layers_where_micromix_errs_less"] > 40
    assert summed["mxfp8"]["over_micromix"]["estimate"] < 0.6
    assert "| micromix | 4.96 |" in table(summed)


def test_files_differ_in_the_order_of_channels_alone(measured):
    folder, _ = measured
    layers = {
        name: read_header(folder / f"{name}.safetensors").models["transformer."]["layers"] for name in ORDERS
    }
    assert len(layers["micromix"]) == 44 and layers["micromix"] == layers["random"] == layers["unsorted"]


def test_rows_are_configurations(measured, tmp_path):
    folder, _ = measured
    (tmp_path / "rows.yaml").write_text(yaml.safe_dump(rows_of(folder, ["micromix", "int8"])))
    read_back = read(tmp_path / "rows.yaml")
    assert read_back["micromix"].linears == str(folder / "micromix.safetensors")
    assert {config.lowering for config in read_back.values()} == {"stock"}
    assert read_back["int8"].linears == "int8"


def test_a_summary_by_hand():
    found = {
        "micromix": {"bits": 5.0, "errors": {"a": [0.01, 0.01, 0.01], "b": [0.03, 0.03, 0.03]}},
        "random": {"bits": 5.0, "errors": {"b": [0.02, 0.02, 0.02], "a": [0.14, 0.14, 0.14]}},
    }
    row = summary(found)["random"]
    assert row["relative_l2"] == pytest.approx(dict.fromkeys(("estimate", "low", "high"), 0.08**0.5))
    assert row["over_micromix"]["estimate"] == pytest.approx(2.0)
    assert (row["layers_where_micromix_errs_less"], row["layers"]) == (1, 2)


def test_orders():
    class Seen:
        def __init__(self):
            self.total = torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64)

    class Calibrated:
        def __init__(self):
            self.inputs = {"a": Seen(), "b": Seen()}

    order = {}
    for name in ORDERS:
        calibrated = Calibrated()
        reorder({"": calibrated}, ORDERS[name])
        order[name] = [each.total.argsort().tolist() for each in calibrated.inputs.values()]
    assert order["micromix"] == [[1, 2, 0]] * 2 and order["unsorted"] == [[0, 1, 2]] * 2
    assert order["random"][0] != order["random"][1]


def test_wide_layers_with_outliers_gain_more(monkeypatch):
    monkeypatch.setattr(synthetic, "_DRAWS", 1)
    monkeypatch.setattr(synthetic, "_OUTPUTS", 32)
    errors = {}
    for words in ("log-normal scales, σ = 0.5", "1 % of channels × 30"):
        for name in ("micromix", "unsorted"):
            found = synthetic.measure(synthetic.SCALES[words], 5.0, ORDERS[name])
            assert 4.9 < found["bits"] <= 5
            errors[words, name] = found["errors"]["layer"][0] ** 0.5
        errors[words] = errors[words, "unsorted"] / errors[words, "micromix"]
    assert errors["log-normal scales, σ = 0.5"] > 1.4 and errors["1 % of channels × 30"] > 2.5
