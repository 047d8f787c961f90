"""A run's report: both files or, for a run that is broken, one clear line and neither file."""

import json

import pytest
from PIL import Image

from dma_diffusers.eval.report.markdown import table, table_by_cost
from dma_diffusers.eval.report.page import html
from dma_diffusers.eval.report.write import write_report
from tests.eval.report.synthetic import SIDE, evaluation, write


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "run", evaluation())
    return tmp_path / "run"


def test_both_files(folder):
    page, markdown = write_report(folder)
    contents = json.loads((folder / "evaluation.json").read_text())
    assert page.read_text() == html(contents, folder)
    assert markdown.read_text() == table(contents) + "\n"
    assert {path.name for path in folder.iterdir()} == {
        "evaluation.json",
        "report.html",
        "report.md",
        "worst",
    }


def test_predicted_costs_have_a_plot_and_a_column(folder):
    path = folder / "evaluation.json"
    contents = json.loads(path.read_text())
    contents["rows"]["all MXFP4"]["predicted_cost"] = 0.7925
    contents["settings"]["target"] = "sm_100"
    path.write_text(json.dumps(contents))
    page, markdown = write_report(folder)
    assert (folder / "predicted_cost.svg").read_text().startswith("<svg")
    assert "predicted for sm_100" in page.read_text() and "| 0.792 |" in markdown.read_text()
    assert table_by_cost(contents) in markdown.read_text()


def _absent(folder):
    (folder / "evaluation.json").unlink()


def _truncated(folder):
    path = folder / "evaluation.json"
    path.write_text(path.read_text()[:5000])


def _not_utf8(folder):
    (folder / "evaluation.json").write_bytes(b'{"command": "\xff"}')


def _bench_result(folder):
    (folder / "evaluation.json").write_text('{"command": "dma-diffusers bench", "shapes": {}}')


def _list(folder):
    (folder / "evaluation.json").write_text("[]")


def _no_picture(folder):
    (folder / "worst" / "7-row.png").unlink()


def _broken_picture(folder):
    path = folder / "worst" / "7-row.png"
    path.write_bytes(path.read_bytes()[:-900])


def _other_size(folder):
    Image.new("RGB", (8, 9)).save(folder / "worst" / "7-row.png")


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (_absent, FileNotFoundError, "there is no .*evaluation.json"),
        (_truncated, ValueError, "evaluation.json is no whole JSON file"),
        (_not_utf8, ValueError, "evaluation.json is no whole JSON file"),
        (_bench_result, ValueError, "no evaluation .* evaluation lacks 'created'"),
        (_list, ValueError, "no evaluation .* evaluation is not an object"),
        (_no_picture, FileNotFoundError, "7-row.png is missing"),
        (_broken_picture, ValueError, "7-row.png is no picture, or a broken one"),
        (_other_size, ValueError, rf"7-row.png .*8 × 9.* {SIDE} × {SIDE}"),
    ],
)
def test_broken_runs(folder, damage, error, message):
    damage(folder)
    with pytest.raises(error, match=message) as raised:
        write_report(folder)
    assert "\n" not in str(raised.value)
    assert not {"report.html", "report.md"} & {path.name for path in folder.iterdir()}


def _edit(*path_and_value):
    *path, last, value = path_and_value

    def edit(contents):
        for key in path:
            contents = contents[key]
        contents[last] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_edit("rows", "noise floor", "role", "floor"), r"rows\['noise floor'\].role is 'floor'"),
        (_edit("rows", "noise floor", "role", "baseline"), "2 rows have the role 'baseline'"),
        (_edit("rows", {}), "0 rows have the role 'baseline'"),
        (_edit("rows", "all INT8", "summary", "lpips", {}), r"summary\['lpips'\] lacks 'estimate'"),
        (_edit("rows", "all INT8", "summary", "lpips", "estimate", "low"), "estimate is not a number"),
        (_edit("rows", "all INT8", "summary", "lpips", "estimate", float("nan")), "NaN is no JSON number"),
        (
            _edit("rows", "all INT8", "summary", "speed", {"estimate": 1}),
            "'speed', which is none of the metrics",
        ),
        (_edit("rows", "all INT8", "pictures", "lpips", [0.1]), "1 values of 'lpips' for 48 pictures"),
        (_edit("rows", "all INT8", "receipt", {"modules": [{}]}), r"modules\[0\] lacks 'module'"),
        (_edit("rows", "all INT8", "seconds_per_picture", True), "seconds_per_picture is not a number"),
        (_edit("settings", "prompts", 7), "settings say 7 prompts, there are 24"),
        (_edit("metrics", "lpips", "better", "left"), "better is 'left'"),
        (_edit("metrics", "lpips", "digits", 2.5), "digits is not a whole number"),
        (_edit("prompts", 5, {}), r"prompts\[5\] lacks 'text'"),
        (_edit("created", "yesterday"), "'yesterday', not a date"),
        (_edit("layers", "steps", [0]), "12 modules × 1 steps"),
        (_edit("worst", 2, "row", "gone"), "row 'gone', prompt 2, which is not there"),
        (_edit("worst", 2, "prompt", 24), "prompt 24, which is not there"),
        (_edit("worst", 2, "pictures", {"row": "worst/2-row.png"}), "lacks a file"),
        (_edit("worst", 2, "pictures", "row", "../../secret.png"), "outside of the run folder"),
    ],
)
def test_broken_evaluations(folder, edit, message):
    contents = evaluation()
    edit(contents)
    (folder / "evaluation.json").write_text(json.dumps(contents))
    with pytest.raises(ValueError, match=message) as raised:
        write_report(folder)
    assert "\n" not in str(raised.value)
    assert not (folder / "report.html").exists()
