"""Off a terminal, progress is a line now and then, with the time left."""

import time

import pytest

from dma_diffusers.progress import progress


@pytest.fixture
def clock(monkeypatch):
    """The seconds of a clock that a test sets."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_long_run_writes_lines_with_the_time_left(clock, capsys):
    """Ten seconds a step: lines of jobs, and of the steps of each, which begin anew."""
    with progress() as on_step:
        on_step("jobs", 0, 40)
        for job in range(4):
            for step in range(5):
                clock[0] += 10
                on_step("steps", step + 1, 5)
            on_step("jobs", job + 1, 40)
    assert capsys.readouterr().err.splitlines() == [
        "steps: 2 of 5, about 30 s left", "jobs: 2 of 40, about 32 min left", "steps: 3 of 5, about 20 s left",
        "steps: 4 of 5, about 10 s left", "jobs: 4 of 40, about 30 min left",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "words"), [(60, "1 of 2, about 60 s"), (600, "about 10 min"), (9000, "about 2.5 h")]
)
def test_time_left_in_words(clock, capsys, seconds, words):
    with progress() as on_step:
        on_step("jobs", 0, 2)
        clock[0] += seconds
        on_step("jobs", 1, 2)
    assert words in capsys.readouterr().err


def test_a_short_run_and_a_silent_one_write_nothing(clock, capsys):
    with progress() as on_step:
        for done in range(6):
            on_step("jobs", done, 6)
            clock[0] += 9
    with progress(False) as on_step:
        for done in range(6):
            on_step("jobs", done, 6)
            clock[0] += 900
    assert not capsys.readouterr().err


def test_a_function_takes_the_place(clock):
    seen = []
    with progress(lambda *step: seen.append(step)) as on_step:
        on_step("jobs", 1, 2)
    assert seen == [("jobs", 1, 2)]
