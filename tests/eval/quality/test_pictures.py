"""Pictures on disk: whole, found again, never mistaken."""

import os

import numpy as np
import pytest
import torch

from dma_diffusers.eval.quality.evaluate import truncated
from dma_diffusers.eval.quality.pictures import KnownBatches, Pictures, batches
from dma_diffusers.eval.quality.prompts import Prompt

PROMPTS = [Prompt(text) for text in ("a", "b", "c")]


@pytest.fixture
def sample():
    return batches(PROMPTS, [0], 1)[0][0]


def folder(tmp_path, **settings) -> Pictures:
    pictures = Pictures(tmp_path, "DMA, window 128", settings)
    pictures.create()
    return pictures


@pytest.mark.parametrize("count", [1, 5])
def test_what_is_written_is_read(tmp_path, sample, count):
    frames = np.random.default_rng(0).integers(0, 256, (count, 7, 9, 3)).astype(np.uint8)
    latents = torch.randn(4, 6)
    pictures = folder(tmp_path)
    assert sample not in pictures
    pictures.write(sample, frames, latents, 0.1)
    assert sample in folder(tmp_path)
    assert np.array_equal(pictures.frames(sample).permute(0, 2, 3, 1).numpy(), frames)
    assert torch.equal(pictures.latents(sample), latents)
    assert pictures.seconds(sample) == 0.1
    assert pictures.remove_corrupt([sample]) == []


def keys(prompts: str, size: int, known=()) -> list[list[str]]:
    """The keys of samples by batch, of prompts of one letter each."""
    return [
        [sample.key for sample in chunk]
        for chunk in batches([Prompt(p) for p in prompts], [0, 1], size, known)
    ]


def test_an_inserted_prompt_leaves_other_batches_valid(tmp_path):
    file = KnownBatches(tmp_path / "pictures", 4)
    assert file.read() == []
    before = batches([Prompt(p) for p in "abcdef"], [0, 1], 4)
    file.write(before)
    of_before = [[sample.key for sample in chunk] for chunk in before]
    known = KnownBatches(tmp_path / "pictures", 4).read()
    assert keys("abcdef", 4, known) == of_before == keys("abcdef", 4)
    assert keys("xabcdef", 4, known)[1:] == of_before
    assert keys("abcdefx", 4, known)[:3] == of_before
    between = keys("abxcdef", 4, known)
    assert [between[0], *between[2:]] == of_before and len(between[1]) == 2
    inside = keys("abcxdef", 4, known)  # of a batch that no longer holds together
    assert inside[0] == of_before[0] and inside[-1] == of_before[2] and of_before[1] not in inside
    assert [len(chunk) for chunk in inside] == [4, 4, 2, 4]
    assert keys("acdef", 4, known)[-2:] == of_before[1:]
    assert KnownBatches(tmp_path / "pictures", 2).read() == []


def test_a_shorter_run_between_leaves_batches_valid(tmp_path):
    file = KnownBatches(tmp_path, 4)
    for prompts in ("abcdef", "abc", "xabcdef"):
        file.write(batches([Prompt(p) for p in prompts], [0, 1], 4, file.read()))
    assert keys("abcdef", 4, file.read()) == keys("abcdef", 4)
    assert keys("abc", 4, file.read()) == keys("abc", 4)
    assert len(file.read()) == 5  # of these three runs


def test_damaged_memory_of_batches_is_none(tmp_path):
    file = KnownBatches(tmp_path, 4)
    file.path.write_text("")
    assert file.read() == []
    file.write(batches(PROMPTS, [0], 4))
    KnownBatches(tmp_path, 2).write(batches(PROMPTS, [0], 2))
    assert [len(chunk) for chunk in file.read()] == [3]


def test_prompts_that_were_cut_are_counted(tmp_path):
    pictures, chunks = folder(tmp_path), batches(PROMPTS, [0, 1], 2)
    for number, chunk in enumerate(chunks):
        for sample in chunk:
            notes = [f"cut {number}"] * (number > 0)
            pictures.write(sample, np.zeros((1, 4, 4, 3), np.uint8), torch.zeros(1), 1.0, notes)
    assert [pictures.notes(chunk[0]) for chunk in chunks] == [[], ["cut 1"], ["cut 2"]]
    assert truncated(pictures, chunks) == ["2 of 3 prompts were not read to the end, the first: cut 1"]
    assert truncated(pictures, chunks[:1]) == []


def test_a_long_video_is_no_bomb(tmp_path, sample, monkeypatch):
    frames = np.zeros((9, 4, 4, 3), np.uint8)
    pictures = folder(tmp_path)
    pictures.write(sample, frames, torch.zeros(1), 1.0)
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 9 * 4 * 4 // 3)
    assert pictures.remove_corrupt([sample]) == []
    assert pictures.frames(sample).shape == (9, 3, 4, 4)


def test_other_settings_are_another_folder(tmp_path, sample):
    folder(tmp_path, window=128).write(sample, np.zeros((1, 4, 4, 3), np.uint8), torch.zeros(1), 1.0)
    assert sample in folder(tmp_path, window=128)
    assert sample not in folder(tmp_path, window=384)
    assert all("dma-window-128" in path.name for path in tmp_path.iterdir())


@pytest.mark.parametrize("suffix", ["png", "safetensors"])
@pytest.mark.parametrize("damage", ["cut", "head", "bit", "gone"])
def test_corrupt_files_are_named_and_removed(tmp_path, sample, suffix, damage):
    pictures = folder(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3)).astype(np.uint8)
    pictures.write(sample, pixels, torch.randn(64), 1.0)
    (path,) = pictures.folder.glob(f"*.{suffix}")
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[20 if damage == "head" else len(data) // 2 if suffix == "png" else -3] ^= 0xFF
        path.write_bytes(data)
    corrupt = pictures.remove_corrupt([sample])
    assert sample not in pictures
    assert corrupt == ([] if (suffix, damage) == ("png", "gone") else [path])


def test_an_interrupted_write_leaves_nothing(tmp_path, sample, monkeypatch):
    pictures = folder(tmp_path)
    monkeypatch.setattr(
        "pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError(28, os.strerror(28)))
    )
    with pytest.raises(OSError, match="No space left"):
        pictures.write(sample, np.zeros((1, 4, 4, 3), np.uint8), torch.zeros(1), 1.0)
    assert sample not in pictures
    assert not [path for path in pictures.folder.iterdir() if sample.key in path.name]


def test_batches_keep_their_samples():
    chunks = batches(PROMPTS, [5, 6], 4)
    assert [[(s.prompt.text, s.seed) for s in chunk] for chunk in chunks] == [
        [("a", 5), ("a", 6), ("b", 5), ("b", 6)],
        [("c", 5), ("c", 6)],
    ]
    keys = [sample.key for chunk in chunks for sample in chunk]
    assert len(set(keys)) == 6
    more = batches([*PROMPTS, Prompt("d")], [5, 6], 4)
    assert [sample.key for sample in more[0]] == keys[:4]  # drawn with the same others
    assert not {sample.key for sample in more[1]} & set(keys)  # two were drawn as a batch of two
    assert not {sample.key for chunk in batches(PROMPTS, [5, 6], 3) for sample in chunk} & set(keys)
