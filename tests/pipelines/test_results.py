"""Test the log of a batch after several processes wrote to it, and after an interruption."""

import json
from multiprocessing import get_context

import pytest

from dma_diffusers.pipelines.results import Results


def _append(folder, writer: int) -> None:
    for i in range(25):
        Results(folder).append({"output": f"{writer}-{i}.png", "prompt": "a" * 20_000, "error": None})


def test_processes_write_whole_lines_after_a_torn_one(tmp_path):
    (tmp_path / "results.jsonl").write_text('{"output": "old.png"}\n{"output": "torn.png", "pro')
    writers = [get_context("fork").Process(target=_append, args=(tmp_path, writer)) for writer in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    found = Results(tmp_path).last()
    assert set(found) == {"old.png", *(f"{writer}-{i}.png" for writer in range(4) for i in range(25))}
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert len(lines) == 102 and lines[1].endswith('"pro')


def test_the_last_line_of_an_output_counts(tmp_path):
    results = Results(tmp_path)
    assert results.last() == {}
    for seed in (1, 2):
        results.append({"output": "a.png", "seed": seed})
    assert results.last() == {"a.png": {"output": "a.png", "seed": 2}}


def test_what_is_no_number_is_refused_before_it_is_written(tmp_path):
    with pytest.raises(ValueError):
        Results(tmp_path).append({"seconds": float("nan")})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("line", ["[1]", "3", "{}", '{"output": ["a"]}', "\x00"])
def test_other_lines_are_not_read(tmp_path, line):
    whole = {"output": "a.png"}
    (tmp_path / "results.jsonl").write_text(f"{line}\n{json.dumps(whole)}\n")
    assert Results(tmp_path).last() == {"a.png": whole}
