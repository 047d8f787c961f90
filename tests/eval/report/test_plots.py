"""The plots: what is on them, read back from the SVG."""

import base64
import io
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from dma_diffusers.eval.report.axes import is_near
from dma_diffusers.eval.report.frames import frame_plot, frame_scores
from dma_diffusers.eval.report.heat_maps import layer_errors
from dma_diffusers.eval.report.pareto import Point, front, pareto
from dma_diffusers.eval.report.steps import step_plot
from dma_diffusers.eval.report.svg import standalone
from tests.eval.report.synthetic import STEPS, evaluation


def texts(svg):
    return [element.text for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_pareto_names_every_configuration():
    contents = evaluation()
    names = [name for name, row in contents["rows"].items() if row["role"] == "configuration"]
    written = texts(pareto(contents, "lpips"))
    assert [text for text in written if text in contents["rows"]] == names
    assert "LPIPS ↓" in written


def test_a_file_of_a_plot_keeps_the_words():
    contents = evaluation()
    contents["rows"]["threshold=0.001"] = contents["rows"].pop("all MXFP4")
    written = pareto(contents, "lpips")
    assert texts(standalone(written)) == texts(written) and "threshold=0.001" in texts(written)
    assert len(standalone(written)) < len(written)


def test_pareto_numbers_many_configurations():
    contents = evaluation()
    row = contents["rows"]["all MXFP4"]
    contents["rows"] |= {f"another {number}": row for number in range(12)}
    written = texts(pareto(contents, "lpips"))
    names = [name for name, row in contents["rows"].items() if row["role"] == "configuration"]
    for number, name in enumerate(names, 1):
        assert str(number) in written and any(
            text.split() == [str(number), *name.split()] for text in written
        )


def test_pareto_of_predicted_costs():
    contents = evaluation()
    assert pareto(contents, "lpips", "predicted_cost") is None
    for number, row in enumerate(contents["rows"].values()):
        row["predicted_cost"] = number / 10
    written = pareto(contents, "lpips", "predicted_cost")
    assert "attention's cost, predicted, of bf16's" in texts(written)
    assert "--ink: #1d1d1b" in standalone(written) and "--ink:" not in written
    assert standalone(written).count("font-family") == 1 and "font-family" not in written


@pytest.mark.parametrize("scale", [1, 1000])
def test_pareto_of_costs_far_apart(scale):
    contents = evaluation()
    contents["rows"]["all MXFP4"]["seconds_per_picture"] *= scale
    assert ("50" in texts(pareto(contents, "lpips"))) == (scale > 1)


def test_nothing_to_plot():
    contents = evaluation()
    for row in contents["rows"].values():
        row["seconds_per_picture"] = None
        row["steps"] = [0.0, 0.0]
    assert (
        pareto(contents, "lpips")
        is pareto(contents, None)
        is step_plot(contents)
        is layer_errors(None)
        is None
    )


@pytest.mark.parametrize("better", ["higher", "lower"])
def test_front_is_what_nothing_beats(better):
    random = np.random.default_rng(1)
    sign = 1 if better == "higher" else -1
    seconds = random.integers(12, size=40).tolist()
    points = [Point("", x, sign * (x + random.integers(4)), 0, 0) for x in seconds]
    unbeaten = {
        (p.cost, p.estimate)
        for p in points
        if not any(
            q.cost <= p.cost and sign * q.estimate >= sign * p.estimate and q[1:3] != p[1:3] for q in points
        )
    }
    assert len(unbeaten) > 2
    stairs = front(points, better)
    assert set(stairs[::2]) == unbeaten
    for before, corner, after in zip(stairs[::2], stairs[1::2], stairs[2::2], strict=False):
        assert corner == (after[0], before[1])


def test_lines_fall_as_the_errors_do():
    contents = evaluation()
    rows = contents["rows"]
    for row in rows.values():
        row["steps"] = [0.1 / 2**step for step in range(STEPS)]
    rows["full precision"]["steps"] = [0.0] * STEPS
    svg = step_plot(contents)
    lines = [
        np.array(re.findall(r"[ML] (\S+) (\S+)", path), float) for path in re.findall(r' d="(M[^"z]+)"', svg)
    ]
    lines = [line for line in lines if len(line) == STEPS]
    assert len(lines) == len(rows) - 1
    for line in lines:  # a power law is straight on a logarithmic axis
        assert np.diff(line, axis=0) == pytest.approx(
            np.tile((line[-1] - line[0]) / (STEPS - 1), (STEPS - 1, 1)), abs=1e-3
        )
        assert line[-1, 1] > line[0, 1]


def test_scores_of_frames_are_two_plots():
    contents = evaluation()
    assert frame_plot(contents) is None
    for i, row in enumerate(contents["rows"].values()):
        row["frames"] = {
            "psnr_db": [40.0 - i - t for t in range(7)],
            "lpips": [0.01 * 2**t for t in range(7)],
        }
    baseline = contents["rows"]["full precision"]
    baseline["frames"] = {"psnr_db": [None] * 7, "lpips": [0.0] * 7}
    contents["rows"]["noise floor"]["frames"]["psnr_db"][3] = None
    svg = frame_plot(contents)
    assert {"PSNR, dB", "LPIPS", "frame"} <= set(texts(svg))
    assert set(frame_scores(contents, "lpips")) == contents["rows"].keys() - {"full precision"}
    lines = [re.findall(r"[ML] \S+ \S+", path) for path in re.findall(r' d="(M[^"z]+)"', svg)]
    whole = [line for line in lines if len(line) == 7]
    assert len(whole) == len(contents["rows"]) - 2 + len(contents["rows"]) - 1  # one PSNR has a gap


def test_heat_maps_share_a_scale():
    maps = {"a": [[0.001, 0.01], [0.02, 0.3]], "b": [[0.3, 0.02], [None, 0.0]]}
    svg = layer_errors({"modules": ["m0", "m1"], "steps": [3, 17], "relative_l2": maps})
    assert {"a", "b", "m0", "m1", "3", "17"} <= set(texts(svg))
    panels = [
        np.array(Image.open(io.BytesIO(base64.b64decode(re.sub(r"\s", "", data)))).convert("RGBA")).tolist()
        for data in re.findall(r'data:image/png;base64,([^"]+)"', svg)
    ]
    a, b = (panel for panel in panels if np.shape(panel) == (2, 2, 4))
    assert a[1][1] == b[0][0]
    assert a[1][0] == b[0][1]
    assert b[1][0] == b[1][1]  # not measured, and 0, which has no logarithm
    assert len({str(colour) for panel in (a, b) for row in panel for colour in row}) == 5
    light = [sum(colour[:3]) for colour in (*a[0], *a[1])]
    assert light == sorted(light)


@pytest.mark.parametrize("modules", [1, 57, 400])
def test_module_names_do_not_crowd(modules):
    names = [f"blocks.{i}.attn" for i in range(modules)]
    svg = layer_errors({"modules": names, "steps": [0], "relative_l2": {"a": [[0.1]] * modules}})
    written = [text for text in texts(svg) if text in names]
    assert written[0] == names[0]
    assert len(written) <= 40


def test_what_did_not_run_is_not_plotted():
    contents = evaluation()
    for number, row in enumerate(contents["rows"].values()):
        row["predicted_cost"] = number / 10
    contents["rows"]["all MXFP4"]["ran"] = 0
    contents["rows"]["all NVFP4"]["ran"] = 0.5
    for cost in ("seconds_per_picture", "predicted_cost"):
        written = texts(pareto(contents, "lpips", cost))
        assert "all NVFP4" in written and "all MXFP4" not in written


def test_seconds_of_the_reference_are_not_plotted():
    contents = evaluation()
    for row in contents["rows"].values():
        row["predicted_cost"] = 0.5
    contents["rows"]["all MXFP4"]["receipt"]["modules"][0]["lowering"] = "reference"
    assert "all MXFP4" not in texts(pareto(contents, "lpips"))
    assert "all MXFP4" in texts(pareto(contents, "lpips", "predicted_cost"))


def test_a_noise_floor_far_away_does_not_squash_the_axes():
    """It is written at the edge, and the axes are those of the configurations."""
    contents = evaluation()
    for row in contents["rows"].values():
        if row["role"] == "noise floor":
            row["summary"]["lpips"] = {"estimate": 1e-6, "low": 1e-6, "high": 1e-6}
            row["steps"] = [1e-7] * STEPS
    assert "noise floor 1e-06 ↓" in texts(pareto(contents, "lpips"))
    assert "noise floor 1e-07 ↓" in texts(step_plot(contents))
    assert not any("1e-05" in text or "0.0001" in text for text in texts(pareto(contents, "lpips")))


def test_a_noise_floor_nearby_is_drawn():
    assert not any("↓" in text and "noise" in text for text in texts(pareto(evaluation(), "lpips")))
    values = [0.06, 0.07, 0.08]
    assert is_near(0.05, values) and is_near(0.12, values) and not is_near(0.13, values)
    assert is_near(1e-3, [0.01, 0.3]) and not is_near(1e-6, [0.01, 0.3])  # in decades
