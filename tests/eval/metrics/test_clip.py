"""CLIPScore of a tiny random CLIP against the formula, picture by picture."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.functional.multimodal import clip_image_quality_assessment
from transformers import CLIPModel

from dma_diffusers.eval.metrics.clip import ClipScorer
from tests.eval.metrics.tiny_clip import END, LENGTH, MEAN, SIDE, STD, save_clip, tokenizer

PROMPTS = ["a cat", "a zebra over a blue mug", "an owl left of two axes on a yellow background"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def pictures():
    """Wider than high, so that the crop shows; smooth, so that resizing keeps something."""
    coarse = np.random.default_rng(0).integers(0, 256, (3, 3, 8, 10)).astype(np.uint8)
    return torch.from_numpy(coarse.repeat(8, 2).repeat(8, 3))


def by_hand(folder, picture, prompt):
    """100 · cos of one picture and one prompt, from the two towers; the text is read at its end."""
    model = CLIPModel.from_pretrained(folder)
    height, width = picture.shape[1:]
    resized = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize(
        (SIDE * width // height, SIDE), Image.Resampling.BICUBIC
    )
    left = (resized.width - SIDE) // 2
    pixels = (np.asarray(resized)[:, left : left + SIDE] / 255 - np.array(MEAN)) / np.array(STD)
    ids = tokenizer()(prompt)["input_ids"]
    ids = ids if len(ids) <= LENGTH else [*ids[: LENGTH - 1], END]
    with torch.no_grad():
        seen = model.vision_model(torch.tensor(pixels.transpose(2, 0, 1)[None], dtype=torch.float32))
        read = model.text_model(torch.tensor([ids])).last_hidden_state[0, -1]
        a = model.visual_projection.weight.double() @ seen.pooler_output[0].double()
        b = model.text_projection.weight.double() @ read.double()
    return 100 * float(a @ b / (a.norm() * b.norm()))


def test_score_is_the_formula(folder, pictures):
    scores = ClipScorer(folder, "cpu").score(pictures, PROMPTS)
    expected = [by_hand(folder, *pair) for pair in zip(pictures, PROMPTS, strict=True)]
    assert scores.shape == (3,) and scores.dtype == torch.float32
    assert min(expected) < 0 < max(expected)
    np.testing.assert_allclose(scores.numpy(), np.maximum(expected, 0), rtol=1e-5, atol=1e-5)


def test_quality_is_the_formula_and_torchmetrics(folder, pictures, monkeypatch, tmp_path):
    scores = ClipScorer(folder, "cpu").quality(pictures)
    good, bad = (
        [by_hand(folder, picture, prompt) for picture in pictures] for prompt in ("Good photo.", "Bad photo.")
    )
    expected = 1 / (1 + np.exp(np.subtract(bad, good)))
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-5, atol=1e-5)

    for name in (
        "get_image_features",
        "get_text_features",
    ):  # of transformers 5, torchmetrics expects tensors
        stock = getattr(CLIPModel, name)
        monkeypatch.setattr(CLIPModel, name, lambda *given, stock=stock: stock(*given).pooler_output)
    named = shutil.copytree(folder, tmp_path / "openai")  # it takes no other folders
    # Their range is divided out before the processor divides by 255, too.
    theirs = clip_image_quality_assessment(pictures.float(), str(named), data_range=1.0)
    np.testing.assert_allclose(
        scores.numpy(), theirs.numpy(), atol=2e-3
    )  # their pictures are resized in float32


def test_long_prompts_are_cut_and_remembered(folder, pictures):
    scorer = ClipScorer(folder, "cpu")
    long = "a cat " * LENGTH
    scores = scorer.score(pictures, [long, "a cat", long[:40]])
    assert scorer.truncated == {long, long[:40]}
    expected = max(by_hand(folder, pictures[0], long), 0)
    assert scores[0].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("nobody/no-such-clip", "hf download nobody/no-such-clip --local-dir FOLDER"),
        ("no/such/folder/at/all", "there is no such folder"),
    ],
)
def test_a_model_that_is_not_there(monkeypatch, model, says):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=says) as raised:
        ClipScorer(model, "cpu")
    assert "\n" not in str(raised.value)


def test_a_folder_without_safetensors(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"it needs config\.json, model\.safetensors"):
        ClipScorer(tmp_path, "cpu")


def test_a_broken_file(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(OSError, match=f"no CLIP in {tmp_path}"):
        ClipScorer(tmp_path, "cpu")


def test_another_kind_of_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip"}))
    with pytest.raises(ValueError, match="is a siglip model; CLIPScore is defined for a clip model"):
        ClipScorer(tmp_path, "cpu")
