"""Test that a job keeps its output whatever happens to the rows around it, and that settings are what decides."""

import pytest

from dma_diffusers.pipelines.jobs import parse
from dma_diffusers.pipelines.tasks import tasks_of
from tests.pipelines.saved_flux import save_flux


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_flux(tmp_path_factory.mktemp("flux") / "model"))


def drawn_by(model, *entries, drawn=None):
    """Outputs of entries by their settings, in the order of the entries."""
    jobs = [
        parse(entry, {"model": model}, f"line {number}", number) for number, entry in enumerate(entries, 1)
    ]
    tasks, failures = tasks_of(jobs, drawn)
    assert not failures
    return {task.output: task.settings for task in sorted(tasks, key=lambda task: task.job.number)}


CAT, DOG, BOAT = ({"prompt": f"a {name}"} for name in ("cat", "dog", "boat"))


def test_default_names_have_row_prompt_and_seed(model):
    assert list(drawn_by(model, CAT, DOG | {"seed": 3})) == ["0001-a-cat-0.png", "0002-a-dog-3.png"]


def test_an_inserted_row_leaves_the_others_their_files(model):
    before = drawn_by(model, CAT, DOG)
    after = drawn_by(model, BOAT, CAT, DOG, drawn=before)
    assert list(after) == ["0001-a-boat-0.png", "0001-a-cat-0.png", "0002-a-dog-0.png"]
    assert before.items() <= after.items()


def test_an_inserted_row_of_the_same_prompt_gets_another_file(model):
    before = drawn_by(model, CAT)
    after = drawn_by(model, CAT | {"low": "nvfp4"}, CAT, drawn=before)
    assert list(after) == ["0001-a-cat-0-2.png", "0001-a-cat-0.png"] and before.items() <= after.items()


def test_a_removed_row_leaves_the_others_their_files(model):
    before = drawn_by(model, CAT, DOG, BOAT)
    assert drawn_by(model, CAT, BOAT, drawn=before).items() <= before.items()


def test_equal_rows_have_files_of_their_own(model):
    before = drawn_by(model, CAT, CAT)
    assert list(before) == ["0001-a-cat-0.png", "0002-a-cat-0.png"]
    assert drawn_by(model, CAT, CAT, drawn=before) == before


def test_an_output_that_a_job_asks_for_is_nobody_elses(model):
    named = CAT | {"output": "0002-a-cat-0.png"}
    assert list(drawn_by(model, named, CAT)) == ["0002-a-cat-0.png", "0002-a-cat-0-2.png"]
    settings = drawn_by(model, CAT)["0001-a-cat-0.png"]
    taken = drawn_by(model, DOG | {"output": "cat.png"}, CAT, drawn={"cat.png": settings})
    assert list(taken) == ["cat.png", "0002-a-cat-0.png"]


def test_a_file_of_another_kind_is_not_taken(model):
    settings = drawn_by(model, CAT)["0001-a-cat-0.png"]
    assert list(drawn_by(model, CAT, drawn={"cat.jpg": settings})) == ["0001-a-cat-0.png"]


def test_settings_are_of_the_weights_not_of_the_path(model, monkeypatch, tmp_path):
    from safetensors.torch import load_file, save_file

    first = drawn_by(model, CAT)
    (tmp_path / "link").symlink_to(model)
    monkeypatch.chdir(tmp_path)
    assert drawn_by("./link", CAT) == drawn_by(str(tmp_path / "link"), CAT) == first
    other = save_flux(tmp_path / "other")
    (weights,) = (other / "transformer").glob("*.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in load_file(weights).items()}, weights)
    assert drawn_by(str(other), CAT) != first
