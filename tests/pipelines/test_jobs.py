"""Test that the three formats of job files give the same jobs, and that bad jobs are refused."""

import csv
import io
import json

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dma_diffusers.config import DMAConfig
from dma_diffusers.pipelines.jobs import Job, read_jobs

WRITERS = {
    ".jsonl": lambda entries: "\n".join(json.dumps(entry) for entry in entries),
    ".csv": lambda entries: _table(entries),
    ".yaml": lambda entries: yaml.safe_dump(entries, allow_unicode=True),
}


def _table(entries: list[dict]) -> str:
    """Write a CSV table; numbers, lists and truth values are JSON, text is left as it is."""
    header = list(dict.fromkeys(name for entry in entries for name in entry))
    buffer = io.StringIO()
    table = csv.DictWriter(buffer, header)
    table.writeheader()
    for entry in entries:
        cells = {
            name: value if isinstance(value, str) else json.dumps(value) for name, value in entry.items()
        }
        table.writerow(cells)
    return buffer.getvalue()


def jobs_of(path, content: str | bytes, **defaults) -> tuple[list[Job], dict[str, str]]:
    """Read the jobs of a file with this content; returns them, and the error of each bad entry by its position."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    jobs, failures = read_jobs(path, defaults)
    assert all("\n" not in failure.error for failure in failures)
    return jobs, {failure.where: failure.error for failure in failures}


def lines(*entries: dict) -> str:
    return WRITERS[".jsonl"](entries)


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=30).filter(
    str.strip
)
SIDE = st.integers(1, 4096)
ENTRY = st.fixed_dictionaries(
    {"prompt": TEXT | st.sampled_from(["007", "true", "null", "[1]", "3.0", 'a "cat", red', "a\u2028b"])},
    optional={
        "seed": st.integers(0, 2**63 - 1),
        "output": st.sampled_from(["a.png", "12.png", "b c.mp4", "ä.webp", "007"]),
        "model": st.sampled_from(["demo", "owner/name", "1"]),
        "steps": st.integers(1, 100),
        "size": st.builds("{}x{}".format, SIDE, SIDE) | SIDE,
        "frames": st.integers(1, 200),
        "fps": st.integers(1, 60) | st.floats(0.5, 60),
        "image": TEXT,
        "negative_prompt": TEXT,
        "high": st.sampled_from(["mxfp8", "bf16"]),
        "protect_text": st.booleans(),
        "dense_above_sigma": st.floats(0, 1) | st.sampled_from([0, 1]),
        "dense_layers": st.lists(st.integers(-3, 3), max_size=3),
        "window": st.integers(0, 1000) | st.lists(st.integers(0, 500), min_size=1, max_size=3),
        "modules": st.just({"blocks.0.Attn": {"window": 384}}),
        "grid": st.just("12x25"),
    },
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.lists(ENTRY, min_size=1, max_size=4))
def test_the_same_jobs_in_three_formats(tmp_path_factory, entries):
    folder = tmp_path_factory.mktemp("jobs")
    found = {}
    for suffix, write in WRITERS.items():
        jobs, failures = jobs_of(folder / f"jobs{suffix}", write(entries))
        assert not failures
        found[suffix] = [{**vars(job), "where": ""} for job in jobs]
    assert found[".jsonl"] == found[".csv"] == found[".yaml"]
    for job, entry in zip(found[".csv"], entries, strict=True):
        assert job["prompt"] == entry["prompt"].strip()
        assert job["seed"] == entry.get("seed", 0) and job["frames"] == entry.get("frames")


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(list(WRITERS)), st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_no_content_is_more_than_one_clear_line(tmp_path_factory, suffix, content):
    try:
        jobs_of(tmp_path_factory.mktemp("jobs") / f"jobs{suffix}", content)
    except ValueError as error:
        assert "\n" not in str(error)


def test_every_field(tmp_path):
    entry = {
        "prompt": " a cat ", "output": "cat.mp4", "model": "owner/name", "seed": 3, "steps": 4, "size": "64x48",
        "frames": 9, "fps": 12.5, "image": "cat.png", "negative_prompt": "dogs", "preset": "hopper",
        "policy": "neighborhood(window=4x4)", "grid": "12x25", "dense_layers": [0, -1],
    }  # fmt: skip
    config = DMAConfig.preset(
        "hopper", policy="neighborhood(window=4x4)", grid=(12, 25), dense_layers=(0, -1)
    )
    assert jobs_of(tmp_path / "jobs.jsonl", lines(entry)) == (
        [
            Job(
                where="line 1", number=1, prompt="a cat", output="cat.mp4", model="owner/name", seed=3, steps=4,
                size=(64, 48), frames=9, fps=12.5, image="cat.png", negative_prompt="dogs", config=config,
            )
        ],
        {},
    )  # fmt: skip


def test_the_command_lines_defaults_are_for_what_a_job_leaves_out(tmp_path):
    content = lines(
        {"prompt": "a"}, {"prompt": "b", "low": "mxfp4", "seed": 5}, {"prompt": "c", "preset": "exact"}
    )
    jobs, failures = jobs_of(tmp_path / "jobs.jsonl", content, low="nvfp4", window=384, seed=4, size="32")
    assert not failures
    assert [job.config for job in jobs] == [
        DMAConfig(low="nvfp4", window=384), DMAConfig(low="mxfp4", window=384), DMAConfig.preset("exact"),
    ]  # fmt: skip
    assert [job.seed for job in jobs] == [4, 5, 4] and jobs[0].size == (32, 32)


def test_frames_and_rate_of_the_command_line_are_for_clips(tmp_path):
    names = ("a.mp4", "a.PNG", None)
    content = lines(*({"prompt": "a", "output": name} for name in names))
    jobs, failures = jobs_of(tmp_path / "jobs.jsonl", content, frames=9, fps=12)
    assert not failures
    assert [(job.frames, job.fps) for job in jobs] == [(9, 12), (None, None), (9, 12)]


def test_a_default_that_no_job_could_take_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match="unknown format 'fp3'"):
        jobs_of(tmp_path / "jobs.jsonl", lines({"prompt": "a"}), low="fp3")


BAD_JOBS = {
    "unknown field": ({"prompt": "a", "stepps": 3, "sead": 1}, "unknown field sead, stepps; there are prompt, output"),
    "no prompt": ({"seed": 3}, "a job needs a prompt"),
    "empty prompt": ({"prompt": "  "}, "prompt must be text, got '  '"),
    "prompt of another type": ({"prompt": 3}, "prompt must be text, got 3"),
    "half a letter": ({"prompt": "\ud800"}, "no Unicode"),
    "no mapping": ([1], "a job maps fields to values"),
    "steps as text": ({"prompt": "a", "steps": "many"}, "steps must be a whole number from 1"),
    "steps as a truth value": ({"prompt": "a", "steps": True}, "got True"),
    "no steps": ({"prompt": "a", "steps": 0}, "steps must be a whole number from 1"),
    "negative seed": ({"prompt": "a", "seed": -1}, "seed must be a whole number from 0"),
    "large seed": ({"prompt": "a", "seed": 2**64}, "seed must be"),
    "three sides": ({"prompt": "a", "size": "1x2x3"}, "size must be WIDTHxHEIGHT in pixels, as in 832x480"),
    "no side": ({"prompt": "a", "size": "0x5"}, "size must be a whole number from 1"),
    "rate of nothing": ({"prompt": "a", "fps": 0}, "fps must be a number"),
    "rate that is NaN": ({"prompt": "a", "fps": float("nan")}, "fps must be a number"),
    "a folder": ({"prompt": "a", "output": "../a.png"}, "a file's name, without a folder, got '../a.png'"),
    "no name": ({"prompt": "a", "output": ".."}, "a file's name"),
    "long name": ({"prompt": "a", "output": "ä" * 120 + ".png"}, "a file's name"),
    "format": ({"prompt": "a", "high": "fp3"}, "unknown format 'fp3'"),
    "preset": ({"prompt": "a", "preset": {"a": 1}}, "unknown preset"),
    "policy file": ({"prompt": "a", "policy": "/no/such.json"}, "no policy file /no/such.json"),
    "quality": ({"prompt": "a", "quality": 0.5}, "quality chooses from a policy file"),
    "window in a policy": ({"prompt": "a", "policy": "dense()", "window": 1}, "leave them out"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_JOBS)
def test_a_bad_job_is_one_line_and_the_others_are_there(tmp_path, name):
    entry, words = BAD_JOBS[name]
    jobs, failures = jobs_of(tmp_path / "jobs.jsonl", lines({"prompt": "first"}, entry, {"prompt": "last"}))
    assert [(job.number, job.prompt) for job in jobs] == [(1, "first"), (3, "last")]
    assert list(failures) == ["line 2"] and words in failures["line 2"]


def test_a_line_that_is_no_json(tmp_path):
    content = '{"prompt": "a"}\n\n{"prompt": \n' + "[" * 100_000 + '\n{"prompt": "b"}\n'
    jobs, failures = jobs_of(tmp_path / "jobs.jsonl", content)
    assert [job.where for job in jobs] == ["line 1", "line 5"]
    assert "line 3" in failures and "not JSON" in failures["line 3"] and "not JSON" in failures["line 4"]


def test_a_row_that_is_no_csv(tmp_path):
    content = '\ufeffPrompt,seed,note\na,1\n"b"c,2\n"d\ne",TRUE\n\nf,,,g\nh,,,\ni,,why\n"j,5\n'
    jobs, failures = jobs_of(tmp_path / "jobs.csv", content)
    assert [(job.prompt, job.seed, job.where) for job in jobs] == [("a", 1, "line 2"), ("h", 0, "line 8")]
    assert [*failures] == ["line 3", "line 4", "line 7", "line 9", "line 10"]
    for where, words in zip(
        failures,
        ("not CSV", "got True", "has 4 cells, the header 3", "unknown field note", "not CSV"),
        strict=True,
    ):
        assert words in failures[where]


BAD_FILES = {
    ("jobs.txt", b"a cat"): "jobs come as .jsonl, .csv, .yaml, .yml, not .txt",
    ("jobs", b"a cat"): "not without a suffix",
    ("jobs.csv", b"prompt\ncaf\xe9"): "is not UTF-8: byte 10 is 0xe9",
    ("jobs.jsonl", b"\n\n"): "holds no jobs",
    ("jobs.csv", b"prompt\n"): "holds no jobs",
    ("jobs.csv", b""): "holds no jobs",
    ("jobs.csv", b"prompt,seed,Prompt\na,1,b\n"): "the header has prompt more than once",
    ("jobs.yaml", b"# nothing"): "holds no jobs",
    ("jobs.yaml", b"prompt: a cat"): "give a list of jobs, as in `- prompt: a cat`",
    ("jobs.yml", b"- prompt: ["): "expected the node content",
}


@pytest.mark.parametrize(("name", "content"), BAD_FILES)
def test_a_bad_file_is_one_line(tmp_path, name, content):
    with pytest.raises(ValueError) as refused:
        jobs_of(tmp_path / name, content)
    assert BAD_FILES[name, content] in str(refused.value) and "\n" not in str(refused.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_jobs(tmp_path / "jobs.csv", {})


def test_jobs_have_schedules(tmp_path):
    words = "sigma>0.9: dense(everywhere=high); low=int8/bf16"
    config = DMAConfig(schedule=words)
    entry = {"prompt": "a cat", "schedule": [[0.9, "dense()"], [0, {"low": "int8/bf16"}]]}
    found, failures = jobs_of(tmp_path / "jobs.jsonl", lines(entry, {"prompt": "a dog", "schedule": words}))
    assert [job.config for job in found] == [config] * 2 and not failures
    table = b'prompt,schedule\na cat,"sigma>0.9: dense(); low=int8/bf16"\na dog,sigma>0.9: dense()\n'
    found, failures = jobs_of(tmp_path / "jobs.csv", table)
    assert [job.config for job in found] == [config]
    assert "nothing holds from sigma 0.9 down to 0" in str(failures)
