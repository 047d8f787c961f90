"""`dma-diffusers batch` as a user meets it: pictures and clips, failures, and going on where it was."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from dma_diffusers.fingerprint import OTHER_WEIGHTS, fingerprint
from dma_diffusers.pipelines.batch import batch as draw_batch
from dma_diffusers.pipelines.files import exclusive
from dma_diffusers.pipelines.jobs import read_jobs
from tests.command_line import ROOT, run, start
from tests.dma_diffusers.test_policy_file import document
from tests.pipelines.saved_flux import save_flux
from tests.tiny_pipelines import flux as tiny_flux
from tests.tiny_pipelines import wan, wan_from_image

CLIP = {"height": 64, "width": 80, "num_frames": 5, "num_inference_steps": 2, "max_sequence_length": 21}


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return str(save_flux(tmp_path_factory.mktemp("flux")))


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan")
    wan().save_pretrained(folder)
    (folder / "generation.json").write_text(json.dumps(CLIP))
    return str(folder)


@pytest.fixture
def batch(monkeypatch, capsys, tmp_path):
    """Runs a batch of entries in `tmp_path`/out: exit status, standard output, lines of standard error."""

    def drawn(entries: list, *arguments: str) -> tuple[int, str, list[str]]:
        jobs = written(tmp_path / "jobs.jsonl", entries)
        code, output, error = run(
            monkeypatch, capsys, "batch", str(jobs), "-o", str(tmp_path / "out"), *arguments
        )
        return code, output, error.splitlines()

    return drawn


def written(path: Path, entries: list) -> Path:
    """A file of jobs; text is a line as it is."""
    path.write_text("".join(f"{e if isinstance(e, str) else json.dumps(e)}\n" for e in entries))
    return path


def results(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def files(folder: Path) -> dict[str, int]:
    """All but the log, and when each was written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != "results.jsonl"}


def frames(path: Path) -> int:
    with Image.open(path) as clip:
        return clip.n_frames


def test_pictures_and_clips_of_several_models(monkeypatch, capsys, batch, flux, video, tmp_path):
    code, output, error = batch(
        [
            {"prompt": "A cat, running!", "model": video, "low": "nvfp4"},
            {"prompt": "a cat", "output": "cat.png", "seed": 7, "low": "nvfp4", "window": 384},
            {"prompt": "a dog runs", "model": video, "frames": 9, "fps": 10, "size": "64x48", "output": "dog.gif"},
            {"prompt": "a red cat", "model": "demo", "steps": 1, "size": 64},
            {"prompt": "a cat", "output": "small.png", "low": "nvfp4", "window": 384, "size": 16},
            {"prompt": "a dog", "output": "dog.png", "low": "nvfp4", "window": 384},
        ],
        "--model", flux,
    )  # fmt: skip
    folder = tmp_path / "out"
    names = ["0001-a-cat-running-0.mp4", "dog.gif", "cat.png", "small.png", "dog.png", "0004-a-red-cat-0.png"]
    assert code == 0, error
    assert output == f"{folder}: 6 drawn, 0 there already, 0 failed\n" and not error
    assert set(files(folder)) == set(names)
    assert frames(folder / "dog.gif") == 9 and Image.open(folder / "dog.gif").size == (64, 48)
    assert Image.open(folder / "0004-a-red-cat-0.png").size == (64, 64)

    found = {result["output"]: result for result in results(folder)}
    assert [*found] == names
    cat = found["cat.png"]
    assert (cat["job"], cat["prompt"], cat["seed"], cat["error"]) == ("line 2", "a cat", 7, None)
    assert cat["model"] == flux and cat["config"] == "mxfp8|nvfp4 diagonal(window=384, sink=128)"
    assert (
        cat["receipt"] == {"intercepted": 2 * 3, "lowerings": ["reference"], "fallbacks": {}, "turned": []}
        and cat["seconds"] > 0
    )
    assert found["0004-a-red-cat-0.png"]["receipt"]["fallbacks"] == {"fewer than 256 keys": 12}

    alone = (
        "--model",
        flux,
        "--seed",
        "7",
        "--low",
        "nvfp4",
        "--window",
        "384",
        "-o",
        str(tmp_path / "a.png"),
    )
    assert run(monkeypatch, capsys, "generate", "a cat", *alone)[0] == 0
    assert (tmp_path / "a.png").read_bytes() == (folder / "cat.png").read_bytes()


def test_each_model_is_loaded_once_and_freed_and_each_configuration_applied_once(
    monkeypatch, batch, flux, video
):
    from dma_diffusers.pipelines import batch as module

    loaded, applied = [], []
    load, apply = module.load_pipeline, module.apply

    def watched_load(model, **options):
        assert all(pipe() is None for _, pipe in loaded), "the model before is still there"
        pipe = load(model, **options)
        loaded.append((model, weakref.ref(pipe.transformer)))
        return pipe

    monkeypatch.setattr(module, "load_pipeline", watched_load)
    monkeypatch.setattr(
        module, "apply", lambda pipe, config: (applied.append(config.low), apply(pipe, config))
    )
    entries = [
        {"prompt": f"{i}", "model": model, "low": low}
        for i in range(2) for model, low in ((flux, "mxfp4"), (video, "mxfp4"), (flux, "nvfp4"))
    ]  # fmt: skip
    code, _, error = batch(entries)
    assert code == 0, error
    assert [model for model, _ in loaded] == [flux, video]
    assert applied == ["mxfp4", "nvfp4", "mxfp4"]


def test_jobs_and_steps_are_counted(flux, tmp_path):
    jobs, _ = read_jobs(written(tmp_path / "jobs.jsonl", [{"prompt": "a", "model": flux}]), {})
    seen = []
    draw_batch(jobs, [], tmp_path, lambda *step: seen.append(step))
    assert seen == [("jobs", 0, 1), ("steps", 1, 2), ("steps", 2, 2), ("jobs", 1, 1)]


def test_bad_jobs_among_good_ones(batch, flux, video, tmp_path):
    bad = {
        '{"prompt":': "it is not JSON",
        '{"prompt": "a", "stepps": 3}': "unknown field stepps",
        '{"prompt": "a", "output": "first.png"}': "first.png is the output of line 1 already",
        '{"prompt": "a", "model": "/no/such/model"}': "neither a folder nor a hub id",
        '{"prompt": "a", "dense_layers": [9]}': "dense_layers \\(9,\\)",
        '{"prompt": "a", "output": "a.txt"}': "picture format",
        '{"prompt": "a", "output": "a.mp4"}': "no picture format",
        '{"prompt": "a", "frames": 5}': "FluxPipeline draws pictures",
        '{"prompt": "a", "size": "41x48"}': "FluxPipeline drew 40x48: ask for that size",
        '{"prompt": "a", "image": "x.png"}': "FluxPipeline, which takes no image",
    }
    bad = list(bad.items())
    of_video = {
        "frames": ({"frames": 6}, "WanPipeline draws 4·k \\+ 1 frames, not 6: take 5 or 9"),
        "size": ({"size": "65x64"}, "multiples of 16, not 65x64: take 64x64"),
        "rate": ({"fps": 60, "output": "a.gif"}, "at most 50 frames per second"),
        "slow": ({"fps": 0.0001}, "0.1 to 1000 frames per second, got 0.0001"),
        "picture": ({"output": "b.png"}, "no clip format"),
    }
    bad += [
        (json.dumps({"prompt": "a", "model": video} | fields), words) for fields, words in of_video.values()
    ]
    first, last = {"prompt": "b", "output": "first.png"}, {"prompt": "c", "output": "last.png"}
    code, output, error = batch([first, *(line for line, _ in bad), last], "--model", flux)
    assert code == 1
    assert f"2 drawn, 0 there already, {len(bad)} failed" in output
    assert set(files(tmp_path / "out")) == {"first.png", "last.png"}
    assert len(error) == len(bad)
    for number, (line, (_, words)) in enumerate(zip(error, bad, strict=True), 2):
        assert re.match(f"failed: line {number}(, .*)?: .*{words}", line), (line, words)
    logged = results(tmp_path / "out")
    assert sum(result["error"] is None for result in logged) == 2 and len(logged) == len(bad) + 2


def test_what_is_there_is_left_alone_and_what_changed_is_drawn_anew(batch, flux, tmp_path):
    folder = tmp_path / "out"
    entries = [{"prompt": "a", "output": f"{i}.png", "seed": i} for i in range(4)]
    assert batch(entries, "--model", flux)[0] == 0
    before, log = files(folder), results(folder)
    assert "0 drawn, 4 there already" in batch(entries, "--model", flux)[1]
    assert files(folder) == before and results(folder) == log

    (folder / "0.png").unlink()
    entries[1]["low"], entries[2]["steps"] = "nvfp4", 1
    code, output, _ = batch(entries, "--model", flux)
    assert code == 0 and "3 drawn, 1 there already, 0 failed" in output
    after = files(folder)
    assert [name for name in sorted(before) if after[name] == before[name]] == ["3.png"]
    assert "4 drawn" in batch(entries, "--model", flux, "--size", "32")[1]
    assert Image.open(folder / "3.png").size == (32, 32)


def test_other_weights_are_drawn_anew_and_other_paths_are_not(batch, flux, tmp_path):
    """The folder's transformer is a link, for fine-tunes share with their base what they have in common."""
    entries = [{"prompt": "a"}, {"prompt": "b"}]
    model = shutil.copytree(flux, tmp_path / "model")
    shutil.rmtree(model / "transformer")
    (model / "transformer").symlink_to(Path(flux) / "transformer")
    assert "2 drawn" in batch(entries, "--model", flux)[1]
    before = files(tmp_path / "out")
    assert "0 drawn, 2 there already" in batch(entries, "--model", str(model))[1]
    assert "1 drawn, 2 there already" in batch([{"prompt": "c"}, *entries], "--model", str(model))[1]
    assert before.items() <= files(tmp_path / "out").items()

    (model / "transformer").unlink()
    tuned = save_tuned(tmp_path / "tuned")
    (model / "transformer").symlink_to(tuned / "transformer")
    pictures = [(tmp_path / "out" / name).read_bytes() for name in before]
    assert "2 drawn, 0 there already" in batch(entries, "--model", str(model))[1]
    assert [(tmp_path / "out" / name).read_bytes() for name in before] != pictures


def save_tuned(folder: Path) -> Path:
    pipe = tiny_flux()
    for parameter in pipe.transformer.parameters():
        parameter.data.mul_(1.2)
    pipe.save_pretrained(folder)
    return folder


def test_a_policy_of_other_weights_is_noted(batch, flux, tmp_path):
    content = document()
    content["model"]["fingerprint"] = fingerprint(tiny_flux().transformer)
    (tmp_path / "policy.json").write_text(json.dumps(content))
    entries = [{"prompt": "a", "policy": str(tmp_path / "policy.json"), "output": "a.png"}]
    code, output, _ = batch(entries, "--model", flux)
    assert code == 0 and output.count("\n") == 1 and results(tmp_path / "out")[-1]["notes"] == []
    tuned = str(save_tuned(tmp_path / "tuned"))
    code, output, _ = batch(entries, "--model", tuned)
    assert code == 0 and f"note: line 1, a.png: {OTHER_WEIGHTS}" in output.splitlines()
    assert results(tmp_path / "out")[-1]["notes"] == [OTHER_WEIGHTS]


def test_what_a_pipeline_would_drop_is_said_or_refused(batch, flux, tmp_path):
    """The tiny FLUX reads 19 bytes of a prompt, and a negative prompt from true_cfg_scale 1 on."""
    negative = {"negative_prompt": "ugly, text"}
    entries = [
        {"prompt": "a cat on a yellow background", "output": "cut.png"},
        {"prompt": "a cat", "output": "ignored.png", **negative},
        {"prompt": "a cat", "output": "guided.png", "true_cfg_scale": 3.0, "guidance_scale": 2, **negative},
        {"prompt": "a cat on a yellow background", "output": "whole.png", "max_sequence_length": 40},
        {"prompt": "a cat", "output": "plain.png"},
    ]
    code, output, error = batch(entries, "--model", flux)
    cut = "the prompt was truncated: tokenizer_2 read the first 19 of 30 tokens"
    assert output.splitlines()[1:] == [f"note: line 1, cut.png: {cut}"]
    words = "FluxPipeline does not read negative_prompt where true_cfg_scale is 1.0"
    assert code == 1 and len(error) == 1 and error[0].startswith(f"failed: line 2, ignored.png: {words}")
    notes = {result["output"]: result.get("notes") for result in results(tmp_path / "out")}
    assert notes == {
        "cut.png": [cut],
        "ignored.png": None,
        "guided.png": [],
        "whole.png": [],
        "plain.png": [],
    }
    assert (tmp_path / "out" / "guided.png").read_bytes() != (tmp_path / "out" / "plain.png").read_bytes()
    assert "1 drawn, 3 there already" in batch([*entries[2:], entries[0] | {"steps": 1}], "--model", flux)[1]


def test_clips_that_start_from_an_image(monkeypatch, batch, tmp_path):
    monkeypatch.setattr("dma_diffusers.pipelines.load.is_ftfy_available", lambda: True)
    stand_in = SimpleNamespace(fix_text=lambda text: text)  # Wan's pipeline calls it, there or not
    monkeypatch.setattr("diffusers.pipelines.wan.pipeline_wan_i2v.ftfy", stand_in, raising=False)
    model, picture, folder = str(tmp_path / "model"), tmp_path / "cat.png", tmp_path / "out"
    wan_from_image().save_pretrained(model)
    (tmp_path / "model" / "generation.json").write_text(json.dumps(CLIP))
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    images = {"red.png": str(picture), "none.gif": None, "gone.gif": str(tmp_path / "gone.png")}
    images |= {"broken.gif": str(tmp_path / "broken.png"), "cat.gif": str(picture)}
    entries = [{"prompt": "a cat runs", "output": name, "image": image} for name, image in images.items()]
    seen = []
    for colour in ("red", "red", "blue"):
        Image.new("RGB", (100, 50), colour).save(picture)
        entries[-1]["image"] = "cat.png"  # beside the job file
        code, output, error = batch(entries, "--model", model)
        assert code == 1
        for line, words in zip(
            error, ("clip format", "starts from an image", "gone.png", "broken.png"), strict=True
        ):
            assert words in line
        seen.append((output.split(" drawn")[0][-1], (folder / "cat.gif").read_bytes()))
    assert [drawn for drawn, _ in seen] == ["1", "0", "1"]
    assert seen[0][1] == seen[1][1] != seen[2][1]


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:900], lambda data: data[:-1] + b"?"])
def test_outputs_that_are_not_what_was_written_are_drawn_anew(batch, flux, tmp_path, damage):
    entries = [{"prompt": prompt, "output": f"{prompt}.png"} for prompt in "ab"]
    assert batch(entries, "--model", flux)[0] == 0
    output = tmp_path / "out" / "b.png"
    whole = output.read_bytes()
    output.write_bytes(damage(whole))
    code, said, _ = batch(entries, "--model", flux)
    assert code == 0 and "1 drawn, 1 there already, 0 failed" in said
    assert said.splitlines()[1].startswith("note: line 2, b.png: what was there is not what was written")
    assert output.read_bytes() == whole
    assert "0 drawn, 2 there already" in batch(entries, "--model", flux)[1]


def test_a_job_that_failed_is_tried_again(monkeypatch, batch, flux, tmp_path):
    from dma_diffusers.pipelines import batch as module

    draw = module.draw

    def fails_once(pipe, prompts, *rest):
        if prompts == ["b"]:
            raise RuntimeError("CUDA out of memory.\nTried to allocate 2.00 GiB.")
        return draw(pipe, prompts, *rest)

    entries = [{"prompt": prompt, "output": f"{prompt}.png"} for prompt in "abc"]
    monkeypatch.setattr(module, "draw", fails_once)
    code, output, error = batch(entries, "--model", flux)
    assert (code, error) == (1, ["failed: line 2, b.png: CUDA out of memory."])
    assert "2 drawn, 0 there already, 1 failed" in output and set(files(tmp_path / "out")) == {
        "a.png",
        "c.png",
    }
    monkeypatch.setattr(module, "draw", draw)
    assert "1 drawn, 2 there already, 0 failed" in batch(entries, "--model", flux)[1]


def test_after_an_interrupt_it_says_what_is_kept(monkeypatch, batch, flux, tmp_path):
    from dma_diffusers.pipelines import batch as module

    draw = module.draw

    def interrupted(pipe, prompts, *rest):
        if prompts == ["b"]:
            raise KeyboardInterrupt
        return draw(pipe, prompts, *rest)

    entries = [{"prompt": prompt, "output": f"{prompt}.png"} for prompt in "abc"]
    monkeypatch.setattr(module, "draw", interrupted)
    code, output, error = batch(entries, "--model", flux)
    folder = tmp_path / "out"
    kept = f"stopped: what was finished is kept in {folder}, and the same command goes on from there"
    assert (code, output, error) == (130, "", ["", kept]) and set(files(folder)) == {"a.png"}
    monkeypatch.setattr(module, "draw", draw)
    with exclusive(folder):
        code, output, error = batch(entries, "--model", flux)
        assert code == 1 and error == [
            f"error: another command works in {folder}: wait for it, or take another folder"
        ]
    assert "2 drawn, 1 there already" in batch(entries, "--model", flux)[1]


def test_a_full_disk_ends_the_batch(monkeypatch, batch, flux, tmp_path):
    from dma_diffusers.pipelines import batch as module

    def full(path, data):
        if path.name == "b.png":
            raise OSError(28, "No space left on device", str(path))
        write(path, data)

    write = module.write_atomically
    monkeypatch.setattr(module, "write_atomically", full)
    entries = [{"prompt": prompt, "output": f"{prompt}.png"} for prompt in "abc"]
    code, output, error = batch(entries, "--model", flux)
    assert (code, output, len(error)) == (1, "", 1) and "No space left on device" in error[0]
    assert set(files(tmp_path / "out")) == {"a.png"} and len(results(tmp_path / "out")) == 1
    monkeypatch.setattr(module, "write_atomically", write)
    assert "2 drawn, 1 there already" in batch(entries, "--model", flux)[1]


@pytest.fixture(scope="module")
def seven(tmp_path_factory, flux, video):
    """Five jobs of two models and two bad ones, and the folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("seven")
    entries = [
        {
            "prompt": f"job {i}",
            "seed": i,
            "steps": 40,
            "preset": "exact",
            "model": video if i % 3 == 0 else flux,
        }
        for i in range(5)
    ]
    bad = [{"prompt": "a", "model": flux, "frames": 5}, {"prompt": "a", "model": flux, "dense_layers": [9]}]
    jobs = written(folder / "jobs.jsonl", [*entries, *bad])
    (folder / "out").mkdir()
    outcome = draw_batch(*read_jobs(jobs, {}), folder / "out", lambda *_: None)
    assert (outcome.drawn, outcome.already_drawn, len(outcome.failures)) == (5, 0, 2)
    return jobs, folder / "out"


def same_files(first: Path, second: Path) -> bool:
    names = set(files(first))
    return names == set(files(second)) and all(
        (first / name).read_bytes() == (second / name).read_bytes() for name in names
    )


def test_a_killed_batch_goes_on(monkeypatch, capsys, seven, tmp_path):
    jobs, undisturbed = seven
    folder = tmp_path / "out"
    process = start("batch", str(jobs), "-o", str(folder), OMP_NUM_THREADS="1")
    log = folder / "results.jsonl"
    while not log.exists() or log.read_bytes().count(b"\n") < 2:  # a bad one, and one that was drawn
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    before = files(folder)
    code, output, error = run(monkeypatch, capsys, "batch", str(jobs), "-o", str(folder))
    assert code == 1 and error.count("\n") == 2
    there = int(output.split(" drawn, ")[1].split()[0])
    assert 1 <= there < 5 and f"{5 - there} drawn" in output
    after = files(folder)
    assert sum(after.get(name) == written_at for name, written_at in before.items()) >= there
    for name in files(undisturbed):
        assert (folder / name).read_bytes() == (undisturbed / name).read_bytes()


def test_processes_share_the_jobs(seven, tmp_path):
    """Launched as `accelerate launch` does for several GPUs; without one it starts a single process."""
    jobs, undisturbed = seven
    folder = tmp_path / "out"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, "-m", "dma_diffusers", "batch", str(jobs), "-o", str(folder)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout.count("5 drawn, 0 there already, 2 failed") == 1, done.stderr
    assert done.stderr.count("failed: line 6: ") == done.stderr.count("failed: line 7, ") == 1
    assert same_files(folder, undisturbed)
    assert sorted(str(result["output"]) for result in results(folder)) == sorted(
        str(result["output"]) for result in results(undisturbed)
    )


BAD = {
    "no file": (("/no/such/jobs.csv",), "/no/such/jobs.csv"),
    "another format": ((str(ROOT / "README.md"),), "jobs come as .jsonl, .csv, .yaml, .yml, not .md"),
    "a default": (("JOBS", "--low", "fp3"), "unknown format 'fp3'"),
    "a size": (("JOBS", "--size", "big"), "size must be WIDTHxHEIGHT"),
    "no folder": (("JOBS", "-o", "/no/such/folder/out"), "/no/such/folder"),
    "a file": (("JOBS", "-o", str(ROOT / "README.md")), "README.md"),
}


@pytest.mark.parametrize(("arguments", "words"), BAD.values(), ids=BAD)
def test_what_no_job_can_have_is_one_line_before_anything_runs(
    monkeypatch, capsys, tmp_path, arguments, words
):
    jobs = written(tmp_path / "jobs.jsonl", [{"prompt": "a"}])
    given = [str(jobs) if argument == "JOBS" else argument for argument in arguments]
    code, output, error = run(monkeypatch, capsys, "batch", "-o", str(tmp_path / "out"), *given)
    assert code == 1 and not output
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error
    assert list(tmp_path.iterdir()) == [jobs]
