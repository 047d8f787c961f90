"""FID and KID of folders, with the network replaced by a few pixels."""

import os

import numpy as np
import pytest
from PIL import Image

from dma_diffusers.eval.metrics import folders
from dma_diffusers.eval.metrics.folders import distances


@pytest.fixture(autouse=True)
def pixels_for_features(monkeypatch):
    monkeypatch.setattr(folders, "inception_features", lambda pictures: pictures[:, :, 150, 150] / 64)


def write(folder, count, seed=0, modes=("RGB",), suffixes=(".png",)):
    noise = np.random.default_rng(seed)
    for i in range(count):
        height, width = noise.integers(8, 64, 2)
        path = folder / f"{i % 2}" / f"{i}{suffixes[i % len(suffixes)]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.full((height, width, 3), noise.integers(256, size=3), np.uint8)
        Image.fromarray(pixels).convert(modes[i % len(modes)]).save(path)
    return folder


def test_a_folder_against_itself_is_0(tmp_path):
    steps = []
    folder = write(tmp_path, 70)
    found = distances(folder, folder, "cpu", lambda *step: steps.append(step))
    assert found.fid == found.kid == (0.0, 0.0, 0.0)
    assert (found.pictures, found.reference_pictures) == (70, 70)
    assert "KID leads" in found.notes[0]
    assert steps == [(64, 140), (70, 140), (134, 140), (140, 140)]


def test_sizes_modes_and_file_types_may_be_mixed(tmp_path):
    folder = write(tmp_path / "a", 12, modes=("RGB", "L", "RGBA", "P"), suffixes=(".png", ".WEBP", ".tif"))
    (folder / "notes.txt").write_text("not a picture")
    found = distances(folder, write(tmp_path / "b", 9, seed=1), "cpu")
    assert (found.pictures, found.reference_pictures) == (12, 9)
    assert found.fid.low <= found.fid.estimate <= found.fid.high
    assert found.fid.estimate > 0


def test_a_broken_file_is_named(tmp_path):
    folder = write(tmp_path, 4)
    broken = folder / "0" / "2.png"
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"0.2\.png is not a picture that can be read") as error:
        distances(folder, folder, "cpu")
    assert "\n" not in str(error.value)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is no folder"):
        distances(tmp_path / "nowhere", tmp_path, "cpu")


@pytest.mark.parametrize("count", [0, 1])
def test_a_folder_with_too_little_is_named(tmp_path, count):
    folder, reference = write(tmp_path / "a", 3), write(tmp_path / "b", count)
    reference.mkdir(exist_ok=True)
    with pytest.raises(ValueError, match=f"b holds {count} pictures .*at least 2"):
        distances(folder, reference, "cpu")


def test_pictures_behind_links_and_of_all_suffixes_count(tmp_path):
    suffixes = (".jfif", ".gif", ".jpe", ".AVIF", ".png")
    elsewhere = write(tmp_path / "elsewhere", 10, suffixes=suffixes)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link").symlink_to(elsewhere)
    (folder / "circle").symlink_to(folder)
    (folder / "one.png").symlink_to(next(elsewhere.rglob("*.png")))
    found = distances(folder, elsewhere, "cpu")
    assert (found.pictures, found.reference_pictures) == (11, 10)


def test_names_of_any_encoding_count(tmp_path):
    folder = write(tmp_path / "a", 3)
    os.rename(folder / "0" / "0.png", os.fsencode(folder) + b"/caf\xe9.png")
    assert distances(folder, folder, "cpu").pictures == 3


def test_what_is_no_picture_is_named(tmp_path):
    folder, reference = write(tmp_path / "a", 3), write(tmp_path / "b", 3)
    for name in ("z.heic", "README"):
        (folder / name).touch()
    *_, note = distances(folder, reference, "cpu").notes
    assert note == f"2 files in {folder} are no pictures and were left out, such as {folder}/README"


def test_an_animation_is_no_picture(tmp_path):
    folder = write(tmp_path, 3)
    frames = [Image.new("L", (9, 9), grey) for grey in (0, 90, 200)]
    frames[0].save(folder / "moves.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(
        ValueError, match=r"moves\.gif is not a picture that can be read \(it holds 3 pictures\)"
    ):
        distances(folder, folder, "cpu")


def test_16_bits_are_the_pictures_of_8(tmp_path):
    """The same pictures in both depths have no distance; clipped ones would be white."""
    noise = np.random.default_rng(0).integers(0, 256, (4, 9, 9)).astype(np.uint8)
    for name, pictures in (("a", noise), ("b", noise.astype(np.uint16) * 257)):
        (tmp_path / name).mkdir()
        for i, values in enumerate(pictures):
            Image.fromarray(values).save(tmp_path / name / f"{i}.png")
    assert distances(tmp_path / "a", tmp_path / "b", "cpu").fid.estimate == 0
