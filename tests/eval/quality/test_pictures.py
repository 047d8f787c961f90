"""Pictures on disk: whole, found again, never mistaken."""

import os

import numpy as np
import pytest
import torch

from dma_diffusers.eval.quality.evaluate import truncated
from dma_diffusers.eval.quality.pictures import Pictures, batches
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
