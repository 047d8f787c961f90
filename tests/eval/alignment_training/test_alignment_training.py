"""The alignment score is trained on concepts apart from the demo model's, scenes of them, and other scenes."""

import json
from random import Random

import pytest
import torch

from dma_diffusers.eval.alignment_training.concepts import ICON_SETS, emoji, is_validation
from dma_diffusers.eval.alignment_training.features import another_scene
from dma_diffusers.eval.alignment_training.train import contrastive_loss
from dma_diffusers.pipelines.demo_training.batches import collate
from dma_diffusers.pipelines.demo_training.scenes import Mention, Scene, sample_scene

ICONS = {
    "Animals & Nature": ["donkey", "cat", "cat-face", "polar-bear", "water-buffalo", "lotus", "paw-prints"],
    "Objects": ["mobile-phone", "telephone", "orange-book", "lipstick", "eight-oclock", "chart-with-upwards"],
    "Flags": ["pennant"],
}


@pytest.fixture
def package(tmp_path):
    (tmp_path / "json").mkdir()
    for name in ICON_SETS:
        icons = [icon for group in ICONS.values() for icon in group]
        spelled = [icon.replace("-", "") for icon in icons] if name == "fxemoji" else icons
        categories = {"Objects": spelled} if name == "fxemoji" else ICONS
        content = {"icons": {icon: {"body": ""} for icon in spelled}, "categories": categories}
        (tmp_path / "json" / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def test_concepts_share_no_word_with_the_demo_model(package):
    concepts, sets = emoji(package)
    assert list(concepts) == ["donkey", "lipstick", "lotus", "water buffalo"]
    assert concepts["water buffalo"] == dict.fromkeys(sets, "water-buffalo") | {"fxemoji": "waterbuffalo"}


def test_a_tenth_is_for_validation():
    held = sum(is_validation(f"concept {i}") for i in range(5000))
    assert 400 < held < 600


def test_scenes_of_any_words():
    words = ["water buffalo", "donkey", "lotus", "gear"]
    scenes = [sample_scene(Random(i), words) for i in range(50)]
    assert {mention.concept for scene in scenes for mention in scene.mentions} == set(words)
    sprites = dict(zip(words, (7, 5, 3, 1), strict=True))
    drawn = collate(scenes, None, sprites).concept
    for row, scene in zip(drawn, scenes, strict=True):
        expected = [sprites[m.concept] for m in scene.mentions for _ in m.places]
        assert row[row >= 0].tolist() == expected


def test_another_scene_has_the_same_things_elsewhere():
    scene = Scene("a gear", "alone", "white", (Mention("gear", None, "gear", ((0.5, 0.5, 0.6),)),))
    for seed in range(300):
        other = another_scene(Random(seed), scene, ["gear", "lotus", "donkey", "lime"])
        shown = other.background, {(m.concept, m.tint, m.places[0][:2]) for m in other.mentions}
        assert shown != ("white", {("gear", None, (0.5, 0.5))})


def test_loss_is_least_for_matching_embeddings():
    torch.manual_seed(0)
    pictures, others = torch.nn.functional.normalize(torch.randn(2, 8, 256), dim=-1)
    matched = contrastive_loss(pictures, pictures, others, 10.0)
    assert matched < contrastive_loss(pictures, pictures.roll(1, 0), others, 10.0)
    assert matched < contrastive_loss(pictures, pictures, pictures, 10.0)  # others as good as the prompts
