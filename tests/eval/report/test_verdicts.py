"""Verdicts of pictures and rows, and the paragraph that puts them in words."""

import pytest

from dma_diffusers.eval.report.in_words import in_words
from dma_diffusers.eval.report.verdicts import DIVERGED, SAME, SCENE, counted, of_row, of_sample, verdicts
from tests.eval.report.synthetic import PROMPTS, SEEDS, evaluation

ALL = PROMPTS * SEEDS


def with_lpips(name, scores):
    contents = evaluation()
    contents["rows"][name]["pictures"]["lpips"] = scores
    return contents


def test_limits_belong_to_the_better_verdict():
    contents = with_lpips("all INT8", [0.0, 0.1, 0.1001, 0.35, 0.3501, *[0.2] * (ALL - 5)])
    found = verdicts(contents, "all INT8")
    assert found[:5] == [SAME, SAME, SCENE, SCENE, DIVERGED]
    assert counted(found) == f"2 same, {ALL - 3} same scene, 1 diverged"
    assert of_sample(contents, "all INT8", 1, 0) == "same scene"  # the third of all, two seeds a prompt
    assert of_sample(contents, "all INT8", 0, 1) == "same picture"
    assert of_sample(contents, "all INT8", 0, 5) is None


def test_what_another_exact_kernel_changes_as_much_is_the_same():
    contents = with_lpips("all INT8", [0.5] * ALL)
    contents["rows"]["noise floor"]["pictures"]["lpips"] = [0.5, 0.49, *[0.0] * (ALL - 2)]
    assert verdicts(contents, "all INT8")[:3] == [SAME, DIVERGED, DIVERGED]


@pytest.mark.parametrize(
    ("same", "scene", "diverged", "verdict"),
    [
        (20, 0, 0, SAME),
        (19, 0, 1, SAME),
        (18, 2, 0, SCENE),
        (0, 19, 1, SCENE),
        (18, 0, 2, DIVERGED),
        (2, 0, 1, DIVERGED),
    ],
)
def test_a_row_has_the_verdict_of_19_in_20(same, scene, diverged, verdict):
    assert of_row([SAME] * same + [SCENE] * scene + [DIVERGED] * diverged) == verdict


def test_rows_without_scores_have_no_verdict():
    contents = evaluation()
    contents["rows"]["all INT8"]["ran"] = 0
    assert not verdicts(contents, "all INT8") and not verdicts(contents, "full precision")
    contents["rows"]["all INT8"]["config"]["linears"] = "fp8"  # they alone may change its pictures
    assert verdicts(contents, "all INT8")
    assert of_row([]) is None


def test_the_paragraph_says_what_the_table_says():
    contents = with_lpips("all MXFP4", [0.2] * ALL)
    for number, row in enumerate(contents["rows"].values()):
        row["predicted_cost"] = 1 - number / 10
    contents["rows"]["all NVFP4"]["pictures"]["lpips"] = [0.6] * ALL
    contents["rows"]["all INT8"]["ran"] = 0
    contents["settings"]["target"] = "sm_100"
    text = in_words(contents)
    assert "the same to the eye as full precision's with 3 of 6 configurations: " in text
    assert f"all MXFP8 ({ALL} same)" in text
    assert (
        f"The scene stays while details change with 1 of 6 configurations: all MXFP4 ({ALL} same scene)."
        in text
    )
    assert f"all NVFP4 ({ALL} diverged)" in text
    assert "Nothing of all INT8 ran at low precision" in text
    lpips = contents["rows"]["all MXFP8"]["summary"]["lpips"]["estimate"]
    assert (
        f"Nearest is all MXFP8, with a mean LPIPS of {lpips:.2g}; another exact kernel alone makes 0.002"
        in text
    )
    cost = contents["rows"]["DMA, window 128"]["predicted_cost"]
    assert (
        f"The cheapest that keeps the pictures is DMA, window 128, whose attention is predicted to cost {cost:.3f}"
        in text
    )


@pytest.mark.parametrize(
    ("count", "share"), [(3, "All 3 pictures are"), (20, "At least 19 of 20 pictures are")]
)
def test_few_pictures_are_counted_and_called_few(count, share):
    contents = evaluation()
    for row in contents["rows"].values():
        row["pictures"]["lpips"] = [0.01] * count
    text = in_words(contents)
    assert text.startswith(share)
    assert ("So few pictures are a first look." in text) == (count < 20)


def test_nothing_to_say_without_lpips():
    contents = evaluation()
    for row in contents["rows"].values():
        del row["pictures"]["lpips"]
    assert in_words(contents) == ""
