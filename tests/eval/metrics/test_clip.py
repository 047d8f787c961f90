"""CLIPScore of a tiny random CLIP against the formula, picture by picture."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import CLIPConfig, CLIPModel

from dma_diffusers.eval.metrics.clip import ClipScorer
from tests import tiny_pipelines

SIDE, LENGTH, END = 32, 24, 3
MEAN, STD = np.array([0.48, 0.46, 0.41]), np.array([0.27, 0.26, 0.28])
PROMPTS = ["a cat", "a zebra over a blue mug", "an owl left of two axes on a yellow background"]


def tokenizer():
    """Bytes between <s> and <unk>: for the sake of old checkpoints CLIP does not look for an end token of id 2."""
    made = tiny_pipelines.tokenizer(LENGTH)
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A <unk>", special_tokens=[("<s>", 1), ("<unk>", END)]
    )
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4)
    vocabulary = dict(vocab_size=tiny_pipelines.VOCABULARY, bos_token_id=1, eos_token_id=END)
    text = shape | vocabulary | dict(max_position_embeddings=LENGTH)
    vision = shape | dict(image_size=SIDE, patch_size=8)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    preparation = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": SIDE},
        "crop_size": {"height": SIDE, "width": SIDE},
        "image_mean": list(MEAN),
        "image_std": list(STD),
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preparation))
    return folder


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
    pixels = (np.asarray(resized)[:, left : left + SIDE] / 255 - MEAN) / STD
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
