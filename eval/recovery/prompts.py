"""Prompts of the embedded models: those to learn from have nothing that the held-out ones have."""

from itertools import product
from random import Random

from dma_diffusers.eval.quality.prompts import built_in, read_prompts
from dma_diffusers.pipelines.demo_training.scenes import sample_training_scene
from dma_diffusers.pipelines.demo_video_training.concepts import BACKGROUNDS, CONCEPTS
from dma_diffusers.pipelines.demo_video_training.motions import MOTIONS
from dma_diffusers.pipelines.demo_video_training.prompts import is_held_out, prompt
from dma_diffusers.pipelines.load import VIDEO_DEMO_MODEL, named_model

_SEED = 21


def training_prompts(model: str, count: int) -> list[str]:
    """Return different prompts of "demo" or "demo-video" without held-out combinations.

    Raises ValueError for more than there are of clips; pictures have prompts without end.
    """
    rng, found = Random(_SEED), dict[str, None]()
    draws_clips = named_model(model) == VIDEO_DEMO_MODEL
    if draws_clips and count > (most := _clips()):
        raise ValueError(f"{model} has {most} prompts to learn from, not {count}: ask for fewer")
    while len(found) < count:
        found[_clip(rng) if draws_clips else sample_training_scene(rng).prompt] = None
    return list(found)


def held_out_prompts(model: str, count: int) -> list[str]:
    """Return the first of the prompts whose combinations no training saw."""
    chosen, _ = read_prompts(built_in(named_model(model)), count)
    return [each.text for each in chosen]


def _clips() -> int:
    return len(BACKGROUNDS) * sum(not is_held_out(*pair) for pair in product(CONCEPTS, MOTIONS))


def _clip(rng: Random) -> str:
    while is_held_out(concept := rng.choice(list(CONCEPTS)), motion := rng.choice(MOTIONS)):
        pass
    return prompt(concept, motion, rng.choice(list(BACKGROUNDS)))
