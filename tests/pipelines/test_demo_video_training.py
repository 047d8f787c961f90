"""Test the video demo's training: its clips, its held-out pairs, and that stock classes do the same arithmetic."""

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from safetensors.torch import save_model

from dma_diffusers.pipelines.demo_training.export import save_pipeline
from dma_diffusers.pipelines.demo_video_training.clips import ClipRenderer, Clips, TrainingClips
from dma_diffusers.pipelines.demo_video_training.concepts import BACKGROUNDS, CONCEPTS
from dma_diffusers.pipelines.demo_video_training.contact_sheet import recognise
from dma_diffusers.pipelines.demo_video_training.export import GENERATION, build_pipeline
from dma_diffusers.pipelines.demo_video_training.model import SpreadPositions, VideoModel
from dma_diffusers.pipelines.demo_video_training.motions import FRAMES, MOTIONS
from dma_diffusers.pipelines.demo_video_training.prompts import held_out_clips, is_held_out, prompt
from dma_diffusers.pipelines.demo_video_training.text import TEXT_TOKENS, prompt_ids, video_tokenizer
from dma_diffusers.pipelines.demo_video_training.timed import timed_steps
from dma_diffusers.pipelines.demo_video_training.train_vae import set_statistics
from dma_diffusers.pipelines.demo_video_training.vae import build_vae, decode, encode, whole_clips

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sprites():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (len(CONCEPTS), FRAMES, 8, 8, 4), dtype=np.uint8)
    pixels[:, 1:] = pixels[:, :1]
    pixels[..., 3] = 255
    return pixels


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    vae, model = build_vae(), VideoModel()
    for module in (vae, model):
        for param in module.parameters():  # many parameters start at zero
            param.data += torch.randn_like(param) / 20
            param.data = param.data.bfloat16().float()
    return vae, model


@pytest.fixture(scope="module")
def pipe(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("video")
    models[0].save_pretrained(folder / "vae")
    save_model(models[1], folder / "model.safetensors")
    save_pipeline(build_pipeline(folder / "model.safetensors", folder / "vae"), folder / "wan", GENERATION)
    return WanPipeline.from_pretrained(folder / "wan")


@pytest.fixture
def clips(sprites):
    return ClipRenderer(sprites, CPU)


def shown(motion: str) -> Clips:
    """Describe one clip of the first concept on white."""
    index = (0, MOTIONS.index(motion), list(BACKGROUNDS).index("white"))
    return Clips(*(torch.tensor([i]) for i in index), torch.zeros(1, 3))


def object_in(frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Measure the object in each frame of ``[3, F, H, W]``: column and row of its centre, and its area in pixels."""
    covered = (frames < 0.99).any(0).float()
    area = covered.sum((1, 2))
    columns, rows = torch.arange(covered.shape[2]), torch.arange(covered.shape[1])
    return (covered.sum(1) @ columns.float()) / area, (covered.sum(2) @ rows.float()) / area, area


@pytest.mark.parametrize(
    ("motion", "measure", "sign"),
    [
        ("moving left", 0, -1),
        ("moving right", 0, 1),
        ("moving up", 1, -1),
        ("moving down", 1, 1),
        ("growing", 2, 1),
        ("shrinking", 2, -1),
    ],
)
def test_motion(clips, motion, measure, sign):
    measures = object_in(clips(shown(motion), range(FRAMES), 64)[0])
    change = [float(m[-1] - m[0]) for m in measures]
    assert sign * change[measure] > 20
    assert all(abs(c) < 2 for m, c in enumerate(change) if m not in (measure, 2))


def test_standing_still_does_not_move(clips):
    frames = clips(shown("standing still"), range(FRAMES), 64)[0]
    assert torch.equal(frames, frames[:, :1].expand_as(frames))


def test_spinning_is_clockwise_and_comes_back(clips):
    frames = clips(shown("spinning"), range(FRAMES), 128)[0]
    square = frames[..., 32:160]
    assert (square[:, 0] - square[:, -1]).abs().max() < 1e-3
    assert (square[:, FRAMES // 4].rot90(1, (1, 2)) - square[:, 0]).abs().mean() < 0.01


def test_every_concept_misses_one_motion():
    unseen = [[m for m in MOTIONS if is_held_out(c, m)] for c in CONCEPTS]
    assert all(len(motions) == 1 for motions in unseen)
    assert {(c, m) for c, m, _ in held_out_clips()} == {
        (c, motions[0]) for c, motions in zip(CONCEPTS, unseen, strict=True)
    }
    assert {m for _, m, _ in held_out_clips()[:10]} == set(MOTIONS)


def test_training_draws_everything_else():
    drawn = TrainingClips(CPU)(20000)
    pairs = set(zip(drawn.concept.tolist(), drawn.motion.tolist(), strict=True))
    words = {(list(CONCEPTS)[c], MOTIONS[m]) for c, m in pairs}
    assert words == {(c, m) for c in CONCEPTS for m in MOTIONS if not is_held_out(c, m)}


def test_prompt_ids_are_the_tokenizers():
    ids = prompt_ids()
    said = prompt("owl", "standing still", "orange")
    assert said == "an owl standing still on an orange background"
    index = list(CONCEPTS).index("owl"), MOTIONS.index("standing still"), list(BACKGROUNDS).index("orange")
    tokens = video_tokenizer()(
        said, padding="max_length", max_length=TEXT_TOKENS, return_tensors="pt"
    ).input_ids
    assert torch.equal(ids[index], tokens[0])
    assert 3 not in ids  # no word is unknown


@pytest.mark.parametrize("frames", [5, 13])
def test_whole_clips_are_what_the_stock_autoencoder_makes_of_chunks(models, frames):
    stock = models[0]
    whole = build_vae()
    whole.load_state_dict(stock.state_dict())
    whole_clips(whole)
    clip = torch.rand(1, 3, frames, 16, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        latents = stock.encode(clip).latent_dist.mean
        assert latents.shape == (1, 16, (frames - 1) // 4 + 1, 2, 4)
        torch.testing.assert_close(encode(whole, clip).mean, latents)
        torch.testing.assert_close(decode(whole, latents).clamp(-1, 1), stock.decode(latents).sample)


def test_positions_of_a_full_clip_are_the_stock_ones():
    grid = (9, 16, 24)
    stock = WanRotaryPosEmbed(64, (1, 1, 1), 64)(torch.zeros(1, 16, *grid))
    for table, expected in zip(SpreadPositions(grid, (1, 1), 64)(None), stock, strict=True):
        torch.testing.assert_close(table, expected)


def test_positions_of_a_smaller_clip_lie_between_those_they_cover():
    cos, sin = SpreadPositions((5, 8, 12), (2, 2), 64)(None)
    angles = torch.atan2(sin, cos).view(5, 8, 12, 64)  # the first frequency of each axis is 1
    assert angles[:, 0, 0, 0].tolist()[:2] == pytest.approx([0, 1.5])  # one latent stands for latents 1 and 2
    assert float(angles[0, 0, 0, 24]) == pytest.approx(0.5)
    assert float(angles[0, 0, 1, 44]) == pytest.approx(2.5)


def test_pipeline_encodes_a_prompt_as_training_does(pipe, models):
    model = models[1]
    ids = model.prompts[3, 2, 4][None]
    said = prompt(list(CONCEPTS)[3], MOTIONS[2], list(BACKGROUNDS)[4])
    tokens, no_prompt = pipe.encode_prompt(said, "", True, max_sequence_length=TEXT_TOKENS)
    with torch.no_grad():
        torch.testing.assert_close(tokens, model.encode(ids))
        torch.testing.assert_close(no_prompt, model.encode(model.no_prompt[None]))


def test_loss_is_nothing_for_the_true_velocity(models, monkeypatch):
    model = models[1]
    latents, noise = torch.randn(2, 2, 16, 2, 2, 3).unbind(0)
    given = {}

    def velocity(hidden_states, timestep, **_):
        given.update(mixed=hidden_states, timestep=timestep)
        return (noise - latents,)

    monkeypatch.setattr(model.transformer, "forward", velocity)
    clips = TrainingClips(CPU)(2)
    assert model(clips, latents, noise, torch.tensor([0.0, 1.0]), torch.tensor([False, True])) == 0
    assert torch.equal(given["mixed"], torch.stack([latents[0], noise[1]]))
    assert given["timestep"].tolist() == [0, 1000]  # the scheduler has these timesteps, too


def test_a_short_call_of_the_stock_pipeline(pipe):
    pipe.set_progress_bar_config(disable=True)
    call = GENERATION | {"num_frames": 5, "height": 16, "width": 32, "num_inference_steps": 1}
    assert pipe("a cat growing on a red background", output_type="np", **call).frames.shape == (
        1,
        5,
        16,
        32,
        3,
    )


def test_weights_stay_below_16_megabytes(models):
    assert sum(p.numel() for module in models for p in module.parameters()) * 2 < 15.8e6


def test_statistics_go_into_the_configuration():
    vae = build_vae()
    latents = torch.randn(4, 16, 3, 5, 7) * 2 + torch.arange(16).view(16, 1, 1, 1)
    set_statistics(vae, latents)
    assert vae.config.latents_mean == pytest.approx(list(range(16)), abs=1)
    assert vae.config.latents_std == pytest.approx([2] * 16, rel=0.2)


def test_clips_are_recognised(clips):
    said = ("bus", "moving up", "pink")
    index = (list(CONCEPTS).index(said[0]), MOTIONS.index(said[1]), list(BACKGROUNDS).index(said[2]))
    frames = clips(
        Clips(*(torch.tensor([i]) for i in index), torch.full((1, 3), 0.02)), range(0, FRAMES, 2), 64
    )[0]
    clip = ((frames + 1) * 127.5).byte().permute(1, 2, 3, 0).numpy()
    assert recognise(clip, said, clips) == [True, True, True]
    assert recognise(clip, ("car", "moving up", "pink"), clips)[0] is False
    assert recognise(clip, ("bus", "moving down", "pink"), clips)[1] is False


def test_timed_steps_end_with_a_full_share():
    shares = [share for _, share in timed_steps(1e-3)]
    assert shares[:3] == [0, 0, 0]
    assert shares[-1] == 1 and all(share < 1 for share in shares[:-1])
