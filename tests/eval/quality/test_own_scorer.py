"""Scorers of one's own: by name, one picture at a time, and a failure is one picture's."""

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dma_diffusers.eval.quality.own_scorer import OwnScorer
from dma_diffusers.eval.quality.scoring import Chunk
from dma_diffusers.eval.quality.summary import summarise_scored
from dma_diffusers.eval.scorers import aesthetic, hps, image_reward
from tests.eval.metrics.tiny_clip import save_clip

CPU = torch.device("cpu")
MODULE = """
def brightness(frames, prompt):
    if prompt == "bad":
        raise RuntimeError("no such\\nthing")
    return float("nan") if prompt == "dark" else frames.float().mean()

brightness.title, brightness.better = "Brightness", "lower"

def lacking(frames, prompt):
    import no_such_package

number = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "own_scores.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "own_scores", raising=False)


def chunk(*prompts):
    frames = (
        torch.arange(len(prompts), dtype=torch.uint8)
        .mul(50)[:, None, None, None, None]
        .expand(-1, 2, 3, 4, 5)
    )
    return Chunk(frames, frames, frames, frames, [*prompts], list(range(7, 7 + len(prompts))))


def test_one_bad_picture_is_named_and_the_others_go_on(module):
    scorer = OwnScorer("own_scores:brightness", CPU)
    scores = scorer(chunk("a", "bad", "b", "dark"))
    assert scores.tolist() == [0, math.inf, 100, math.inf]
    assert scorer.failures == ["'bad', seed 8 (RuntimeError: no such thing)", "'dark', seed 10 (it gave nan)"]
    assert scorer.column == {"title": "Brightness", "better": "lower", "digits": 3}
    summary = summarise_scored(scores.tolist(), 2)
    assert (summary["estimate"], summary["n"]) == (50, 2)  # of each prompt's one picture that has a score


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("own_scores", "give module:function"),
        ("no_such_module:score", "no_such_module cannot be imported"),
        ("own_scores:nothing", "own_scores has no function nothing"),
        ("own_scores:number", "own_scores has no function number"),
        ("own_scores:lacking", "No module named 'no_such_package'"),
        ("dma_diffusers.eval.scorers.image_reward:score", "pip install image-reward"),
        ("dma_diffusers.eval.scorers.hps:score", "pip install hpsv2"),
        ("dma_diffusers.eval.scorers.aesthetic:score", "set the environment variable AESTHETIC_CLIP"),
    ],
)
def test_what_is_missing_is_said_at_once(module, monkeypatch, name, says):
    monkeypatch.delenv("AESTHETIC_CLIP", raising=False)
    with pytest.raises(ValueError, match=says) as raised:
        OwnScorer(name, CPU)
    assert f"--scorer {name}" in str(raised.value) and "\n" not in str(raised.value)


def test_aesthetic_score_by_hand(tmp_path, monkeypatch):
    """A tiny random CLIP, and a head of three layers, in float64."""
    folder = save_clip(tmp_path / "clip")
    torch.manual_seed(1)
    head = {}
    for place, (inner, outer) in {0: (16, 8), 2: (8, 4), 10: (4, 1)}.items():
        head[f"layers.{place}.weight"], head[f"layers.{place}.bias"] = (
            torch.randn(outer, inner),
            torch.randn(outer),
        )
    torch.save(head, tmp_path / "head.pth")
    monkeypatch.setenv("AESTHETIC_CLIP", str(folder))
    monkeypatch.setenv("AESTHETIC_HEAD", str(tmp_path / "head.pth"))
    frames = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)

    seen = embedded_by_hand(folder, frames[1])
    for place in (0, 2, 10):
        seen = (
            head[f"layers.{place}.weight"].double().numpy() @ seen
            + head[f"layers.{place}.bias"].double().numpy()
        )
    assert aesthetic.score(frames, "") == pytest.approx(seen.item(), rel=1e-5, abs=1e-5)


def embedded_by_hand(folder, picture):
    """The vision tower of a CLIP in NumPy and float64, layer by layer, and its projection, of length 1."""
    weights = {
        name: tensor.double().numpy() for name, tensor in load_file(folder / "model.safetensors").items()
    }

    def linear(name, x):
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)

    def norm(name, x):
        x = x - x.mean(-1, keepdims=True)
        return (
            x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weights[f"{name}.weight"]
            + weights[f"{name}.bias"]
        )

    tower, heads, width, patch = "vision_model", 4, 32, 8
    pixels = (picture.double().numpy() / 255 - np.array([0.48, 0.46, 0.41])[:, None, None]) / np.array(
        [0.27, 0.26, 0.28]
    )[:, None, None]
    patches = pixels.reshape(3, 4, patch, 4, patch).transpose(1, 3, 0, 2, 4).reshape(16, -1)
    kernel = weights[f"{tower}.embeddings.patch_embedding.weight"].reshape(width, -1)
    x = np.concatenate([weights[f"{tower}.embeddings.class_embedding"][None], patches @ kernel.T])
    x = norm(f"{tower}.pre_layrnorm", x + weights[f"{tower}.embeddings.position_embedding.weight"])
    for layer in range(2):
        at = f"{tower}.encoder.layers.{layer}"
        normed = norm(f"{at}.layer_norm1", x)
        q, k, v = (
            linear(f"{at}.self_attn.{part}_proj", normed).reshape(17, heads, -1).transpose(1, 0, 2)
            for part in "qkv"
        )
        scores = np.exp(q @ k.transpose(0, 2, 1) / np.sqrt(width // heads))
        mixed = (scores / scores.sum(-1, keepdims=True) @ v).transpose(1, 0, 2).reshape(17, width)
        x = x + linear(f"{at}.self_attn.out_proj", mixed)
        hidden = linear(f"{at}.mlp.fc1", norm(f"{at}.layer_norm2", x))
        x = x + linear(f"{at}.mlp.fc2", hidden / (1 + np.exp(-1.702 * hidden)))
    found = linear("visual_projection", norm(f"{tower}.post_layernorm", x[0]))
    return found / np.linalg.norm(found)


def test_a_head_for_another_clip_is_refused(tmp_path, monkeypatch):
    torch.save(
        {"layers.0.weight": torch.randn(1, 768), "layers.0.bias": torch.randn(1)}, tmp_path / "head.pth"
    )
    monkeypatch.setenv("AESTHETIC_CLIP", str(save_clip(tmp_path / "clip")))
    monkeypatch.setenv("AESTHETIC_HEAD", str(tmp_path / "head.pth"))
    with pytest.raises(ValueError, match="reads 768 numbers, AESTHETIC_CLIP gives 16"):
        aesthetic.score(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "")


def test_packages_get_the_middle_frame_and_the_prompt(monkeypatch):
    frames = torch.arange(3, dtype=torch.uint8)[:, None, None, None].expand(3, 3, 4, 5)

    def mean(picture: Image.Image) -> float:
        return float(np.asarray(picture).mean())

    reward = SimpleNamespace(
        load=lambda name, device: SimpleNamespace(score=lambda prompt, picture: mean(picture) + len(prompt))
    )
    preference = SimpleNamespace(
        score=lambda pictures, prompt, hps_version: [
            mean(each) + len(prompt) + float(hps_version[1:]) for each in pictures
        ]
    )
    monkeypatch.setitem(sys.modules, "ImageReward", reward)
    monkeypatch.setitem(sys.modules, "hpsv2", preference)
    image_reward._model.cache_clear()
    assert image_reward.score(frames, "abc") == 4
    assert hps.score(frames, "abc") == pytest.approx(6.1)
    image_reward._model.cache_clear()
