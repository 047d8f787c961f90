"""`dma-diffusers distance` as a user meets it."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.command_line import run


@pytest.fixture
def folders(tmp_path):
    """Two folders of pictures of any size."""
    rng = np.random.default_rng(0)
    for name, brightest in (("dark", 40), ("light", 256)):
        (tmp_path / name).mkdir()
        for i in range(3):
            pixels = rng.integers(0, brightest, (40 + i, 50, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    return str(tmp_path / "dark"), str(tmp_path / "light")


def test_it_prints_both_distances(monkeypatch, capsys, folders):
    code, output, error = run(monkeypatch, capsys, "distance", *folders, "--json")
    found = json.loads(output)
    assert code == 0, error
    assert found["pictures"] == found["reference_pictures"] == 3
    assert found["fid"]["low"] < found["fid"]["estimate"] < found["fid"]["high"]
    assert found["fid"]["estimate"] > 10 and found["kid"]["estimate"] > 0
    code, output, _ = run(monkeypatch, capsys, "distance", *folders)
    assert f"{found['fid']['estimate']:.6g}" in output and "3 pictures against 3" in output
    assert "fewer than 2,000" in output


def test_a_folder_against_itself_is_zero(monkeypatch, capsys, folders):
    _, output, _ = run(monkeypatch, capsys, "distance", folders[0], folders[0], "--json")
    assert json.loads(output)["fid"]["estimate"] == json.loads(output)["kid"]["estimate"] == 0


def test_bad_folders_are_one_line(monkeypatch, capsys, folders, tmp_path):
    (tmp_path / "light" / "1.png").write_bytes(b"no picture")
    for arguments, words in (
        (folders, "1.png is not a picture"),
        ((folders[0], str(tmp_path / "gone")), "gone is no folder"),
    ):
        code, output, error = run(monkeypatch, capsys, "distance", *arguments)
        assert code == 1 and not output
        assert error.count("\n") == 1 and words in error
