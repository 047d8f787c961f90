"""The page: whole, self-contained, escaped, and with the evaluation's numbers in it."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from dma_diffusers.eval.report.in_words import in_words
from dma_diffusers.eval.report.page import html
from dma_diffusers.pipelines.picture import amplified_difference
from tests.eval.report.synthetic import NASTY, PROMPTS, SEEDS, evaluation, write

_VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """A page's tags with their attributes, its visible text, and the cells of its tables by id."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.ids, self.text, self.tables = [], [], [], [], {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if tag not in _VOID:
            self.open.append(tag)
        if tag == "table":
            self.table = self.tables.setdefault(attributes.get("id"), [])
        if tag == "tr":
            self.table.append([])
        if tag in ("td", "th"):
            self.table[-1].append([])

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open and data.strip():
            self.text.append(data.strip())
            if "td" in self.open or "th" in self.open:
                self.table[-1][-1].append(data.strip())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder, contents = tmp_path_factory.mktemp("runs") / "run", evaluation()
    write(folder, contents)
    return folder, contents


@pytest.fixture(scope="module")
def text(run):
    folder, contents = run
    return html(contents, folder)


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_ids_are_unique(page):
    assert len(page.ids) == len(set(page.ids))


def test_nothing_is_requested(page, text):
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base")
        for name in ("src", "href", "xlink:href", "srcset", "data"):
            assert re.match(r"data:image/(png|webp);base64,|#", attributes.get(name) or "#")
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    policy = next(a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'")


def test_prompts_appear_literally(page, text):
    assert NASTY not in text
    assert f"“{NASTY}”" in " ".join(page.text)


def test_all_other_texts_appear_literally(run):
    contents = evaluation()
    places = {key: f"{NASTY} $^{key}$" for key in ("name", "label", "title", "category", "note", "module")}
    contents["rows"][places["name"]] = contents["rows"].pop("all MXFP8") | {"label": places["label"]}
    contents["metrics"]["lpips"]["title"] = places["title"]
    contents["prompts"][0]["category"] = places["category"]
    contents["notes"] = [places["note"]]
    layers = contents["layers"]
    layers["relative_l2"][places["name"]] = layers["relative_l2"].pop("all MXFP8")
    layers["modules"][0] = places["module"]
    del contents["worst"][1:]
    drawn = html(contents, run[0])
    assert "<script" not in drawn
    page = Page(drawn)
    for text in places.values():
        assert text in " ".join(page.text)
    plotted = " ".join(re.findall(r"<text.*?</text>", drawn, re.DOTALL))
    for key in ("name", "title", "module"):
        assert f"$^{key}$" in plotted


def test_table_has_the_evaluations_numbers(run, page):
    _, contents = run
    head, *lines = page.tables["metrics"]
    metrics = [name for name in contents["metrics"] if name != "alignment"]  # no row has that
    for (title, n), name in zip(head[2:-1], metrics, strict=True):
        arrow = "↑" if contents["metrics"][name]["better"] == "higher" else "↓"
        assert (title, n) == (f"{contents['metrics'][name]['title']}\xa0{arrow}", f"n = {PROMPTS * SEEDS}")
    for (first, _, *cells, seconds), (name, row) in zip(lines, contents["rows"].items(), strict=True):
        assert first[0] == name
        assert float(seconds[0]) == pytest.approx(row["seconds_per_picture"], rel=5e-3)
        for shown, metric in zip(cells, metrics, strict=True):
            figure, digits = row["summary"].get(metric), contents["metrics"][metric]["digits"]
            if figure is None:
                assert shown == ["–"]
            elif figure["estimate"] is None:
                assert shown == ["∞"]
            else:
                numbers = re.findall(r"-?[\d.]+", " ".join(shown).replace("−", "-"))
                expected = [figure["estimate"]]
                if figure["low"] != figure["high"]:
                    expected += [figure["low"], figure["high"]]
                assert [float(number) for number in numbers] == pytest.approx(
                    expected, abs=0.51 * 10**-digits
                )


def test_baseline_and_noise_floor_are_marked(page):
    assert page.tables["metrics"][1][0] == ["full precision", "baseline"]
    classes = [a.get("class") for tag, a in page.tags if tag == "tr" and "class" in a]
    assert classes == ["baseline", "noise-floor", *["configuration"] * 6]


def test_rows_have_verdicts_and_what_ran(run, page, text):
    _, contents = run
    head, *lines = page.tables["metrics"]
    assert head[1] == ["Verdict", "of 19 in 20"]
    shown = {line[0][0]: line for line in lines}
    assert shown["full precision"][1] == ["–"]
    assert shown["all MXFP8"][:2] == [
        ["all MXFP8", "12 modules: mxfp8|mxfp4 diagonal, faithful"],
        ["same picture", f"{PROMPTS * SEEDS} same"],
    ]
    assert in_words(contents) in " ".join(page.text).replace("In short. ", "")
    entry = contents["worst"][0]
    assert (
        f"seed {entry['seed']} · LPIPS {entry['value']:.4f} · same picture" in page.text
    )  # by its stored scores
    assert text.count('<details name="worst" open>') == 1 and text.count('<details name="worst">') == 2


def test_categories_have_means_over_their_prompts(run, page):
    _, contents = run
    (_, _, *names), *lines = page.tables["categories"]
    assert [name for (name,) in names] == list(contents["rows"])[1:]
    for category, count, *cells in lines:
        chosen = [i for i, prompt in enumerate(contents["prompts"]) if prompt["category"] == category[0]]
        assert int(count[0]) == len(chosen)
        for cell, (name,) in zip(cells, names, strict=True):
            values = contents["rows"][name]["pictures"]["lpips"]
            mean = np.mean([values[SEEDS * i + seed] for i in chosen for seed in range(SEEDS)])
            assert float(cell[0]) == pytest.approx(mean, abs=0.51e-4)
            low, high = map(float, cell[1].strip("[]").split(", "))
            assert low <= mean <= high


def test_worst_pictures_are_those_in_the_folder(run, page):
    folder, contents = run
    shown = [picture(a["src"]) for tag, a in page.tags if tag == "img"]
    assert len(shown) == 30
    rows = list(dict.fromkeys(entry["row"] for entry in contents["worst"]))
    entries = sorted(contents["worst"], key=lambda entry: rows.index(entry["row"]))
    assert [a.get("name") for tag, a in page.tags if tag == "details"][:4] == [*["worst"] * 3, None]
    for entry, reference, drawn, difference in zip(
        entries, shown[::3], shown[1::3], shown[2::3], strict=True
    ):
        expected = Image.open(folder / entry["pictures"]["full precision"])
        assert np.array_equal(reference, expected)
        assert np.array_equal(drawn, Image.open(folder / entry["pictures"]["row"]))
        amplified, factor = amplified_difference(Image.fromarray(drawn), expected)
        off = np.abs(difference.astype(int) - np.asarray(amplified))  # lossy: it is for the eye
        assert np.mean(off) < 0.5 * np.mean(amplified)
        assert f"difference × {factor}" in page.text


def picture(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def test_large_pictures_are_shrunk(tmp_path):
    folder, contents = tmp_path / "run", evaluation() | {"layers": None}
    write(folder, contents)
    del contents["worst"][1:]
    for path in (folder / "worst").iterdir():
        Image.new("RGB", (1024, 768), "red").save(path)
    shown = [a["src"] for tag, a in Page(html(contents, folder)).tags if tag == "img"]
    assert picture(shown[0]).shape == (384, 512, 3)


def test_the_same_evaluation_gives_the_same_page(run, text):
    folder, contents = run
    assert html(contents, folder) == text


def test_everything_else_is_there(run, page):
    _, contents = run
    text = " ".join(page.text)
    for expected in (
        contents["command"],
        "NVIDIA H200",
        "2026-11-21 20:00 UTC",
        contents["notes"][0],
        "2.11.0",
        "means over the first 8 pictures",
        "a mean over 2 prompts",
    ):
        assert expected in text
    assert "12 modules (transformer_blocks.0.attn, …): mxfp8|mxfp4 diagonal" in text
    assert sum(tag == "svg" for tag, _ in page.tags) == 3


def test_fields_that_a_configuration_does_not_use_are_not_shown(run):
    folder, contents = run[0], evaluation()
    fields = {"high": "mxfp8", "low": "mxfp4", "window": 128, "sink": 64, "policy": None, "lowering": "auto"}
    changes = {"all INT8": {}, "all MXFP8": {"policy": "dense()"}, "all MXFP4": {"lowering": "stock"}}
    for name, row in contents["rows"].items():
        row["config"] = fields | changes[name] if name in changes else None
    shown = {row[0][0]: [cell[0] for cell in row[1:]] for row in Page(html(contents, folder)).tables[None]}
    assert shown["Attention"] == list(fields)
    assert shown["all INT8"] == ["mxfp8", "mxfp4", "128", "64", "–", "auto"]
    assert shown["all MXFP8"] == ["mxfp8", "mxfp4", "–", "–", "dense()", "auto"]
    assert shown["all MXFP4"] == ["–", "–", "–", "–", "–", "stock"]


@pytest.mark.parametrize("empty", [None, []])
def test_parts_may_be_missing(tmp_path, empty):
    contents = evaluation()
    contents |= {"layers": None, "worst": empty, "notes": []}
    for prompt in contents["prompts"]:
        prompt["category"] = None
    for row in contents["rows"].values():
        row |= {"steps": empty, "receipt": None, "seconds_per_picture": None, "pictures": {}, "label": None}
    page = Page(html(contents, tmp_path))
    assert list(page.tables) == ["metrics", None]  # and the configurations
    assert not {"svg", "img"} & {tag for tag, _ in page.tags}


def test_psnr_stands_in_for_lpips(run):
    folder, contents = run[0], evaluation()
    for row in contents["rows"].values():
        del row["summary"]["lpips"], row["pictures"]["lpips"]
    del contents["worst"][1:]
    contents["worst"][0]["metric"] = "psnr_db"
    page = Page(html(contents, folder))
    assert "PSNR, dB by category" in page.text
    assert "PSNR, dB ↑" in page.text  # the plot's axis


def test_rows_say_what_ran_and_which_pictures_are_identical(run):
    contents = evaluation()
    row = contents["rows"]["all MXFP4"]
    row["ran"] = 0
    row["summary"]["psnr_db"]["identical"] = 5
    row["receipt"]["modules"][0]["lowering"] = "reference"
    shown = {line[0][0]: line for line in Page(html(contents, run[0])).tables["metrics"]}
    assert "no call ran at low precision" in shown["all MXFP4"][0]
    assert "5 identical" in shown["all MXFP4"][2]
    assert "by the reference in torch, not a kernel" in shown["all MXFP4"][-1]
    assert not any("ran at low precision" in text for text in shown["all NVFP4"][0])


def test_a_category_is_not_infinite_by_one_picture(run):
    contents = evaluation()
    for row in contents["rows"].values():
        if row["role"] != "baseline":
            row["pictures"] = {"psnr_db": [30.0] * (PROMPTS * SEEDS)}
    del contents["metrics"]["lpips"]
    for row in contents["rows"].values():
        row["summary"].pop("lpips")
        row.get("pictures", {}).pop("lpips", None)
    contents["rows"]["all MXFP4"]["pictures"]["psnr_db"][0] = None
    table = Page(html(contents, run[0])).tables["categories"]
    assert {cell[0] for line in table[1:] for cell in line[2:]} == {"30.00"}
