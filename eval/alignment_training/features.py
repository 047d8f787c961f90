"""This script draws sprites and scenes, and stores what the frozen encoders make of them and of their prompts.

python -m dma_diffusers.eval.alignment_training.features package .alignment/features.safetensors
"""

import argparse
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from random import Random

import numpy as np
import torch
from safetensors.torch import save_file

from dma_diffusers.eval.alignment_training.concepts import emoji, is_validation
from dma_diffusers.eval.metrics.alignment import FrozenEncoders
from dma_diffusers.pipelines.demo_training.batches import collate
from dma_diffusers.pipelines.demo_training.render import SceneRenderer
from dma_diffusers.pipelines.demo_training.scenes import MAX_OBJECTS, Scene, sample_scene
from dma_diffusers.pipelines.demo_training.sprites import render_icon

_SEED, _SEED_OF_OTHERS = 1, 5
_RESOLUTION = 224
_BATCH = 8
_GROUP = 80  # the sprites of so many concepts are in memory together
_SCENES_PER_CONCEPT = 2  # each pass over the concepts draws so many


def another_scene(rng: Random, scene: Scene, concepts: list[str]) -> Scene:
    """Return another scene than `scene` of the same things, with others of `concepts` where they are too few."""
    words = [mention.concept for mention in scene.mentions]
    while len(words) < MAX_OBJECTS:
        if (word := rng.choice(concepts)) not in words:
            words.append(word)
    while _content(other := sample_scene(rng, words)) == _content(scene):
        pass
    return other


def _content(scene: Scene) -> tuple:
    """Return what a scene shows, sizes aside: two prompts can say the same."""
    objects = {(m.concept, m.tint, tuple(place[:2] for place in m.places)) for m in scene.mentions}
    return scene.background, frozenset(objects)


def _groups(rng: Random, training: list[str], validation: list[str]) -> Iterator[list[str]]:
    """Yield groups of concepts that scenes are drawn of, endlessly; training and validation never meet in one."""
    while True:
        shuffled = training.copy()
        rng.shuffle(shuffled)
        for start in range(0, len(shuffled) - _GROUP // 2, _GROUP):
            yield shuffled[start : start + _GROUP]
        yield validation


def draw(
    sprites: dict[str, np.ndarray], count: int, encoders: FrozenEncoders
) -> tuple[list[Scene], torch.Tensor]:
    """Draw `count` scenes, and return them with their frozen features, float16 `[count, GRID², 1280]`.

    Args:
        sprites: concept -> uint8 `[pictures of it, S, S, 4]`.
    """
    rng, scenes, features = Random(_SEED), [], []
    validation = [concept for concept in sprites if is_validation(concept)]
    training = [concept for concept in sprites if not is_validation(concept)]
    for group in _groups(rng, training, validation):
        if len(scenes) >= count:
            return scenes[:count], torch.cat(features)[:count]
        ends = accumulate(len(sprites[concept]) for concept in group)
        first = {concept: end - len(sprites[concept]) for concept, end in zip(group, ends, strict=True)}
        renderer = SceneRenderer(np.concatenate([sprites[concept] for concept in group]), torch.device("cpu"))
        for _ in range(len(group) * _SCENES_PER_CONCEPT // _BATCH):
            batch = [sample_scene(rng, group) for _ in range(_BATCH)]
            chosen = {concept: first[concept] + rng.randrange(len(sprites[concept])) for concept in group}
            pictures = renderer(collate(batch, rng, chosen), _RESOLUTION)
            features.append(encoders.see(((pictures + 1) * 127.5).round().to(torch.uint8)).half())
            scenes += batch


def _read(encoders: FrozenEncoders, prompts: list[str]) -> torch.Tensor:
    parts = [prompts[i : i + _BATCH] for i in range(0, len(prompts), _BATCH)]
    return torch.cat([encoders.read(part) for part in parts])


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("package", type=Path, help="unpacked npm package @iconify/json 2.2.535")
    parser.add_argument("output", type=Path, help="the .safetensors to write")
    parser.add_argument("--scenes", type=int, default=7000)
    args = parser.parse_args()

    concepts, sets = emoji(args.package)
    sprites = {
        concept: np.stack([render_icon(sets[name], icon) for name, icon in icons.items()])
        for concept, icons in concepts.items()
    }
    encoders = FrozenEncoders(torch.device("cpu"))
    scenes, pictures = draw(sprites, args.scenes, encoders)

    rng = Random(_SEED_OF_OTHERS)
    held_out = [is_validation(scene.mentions[0].concept) for scene in scenes]
    pools = {
        held: [concept for concept in concepts if is_validation(concept) == held] for held in (False, True)
    }
    others = [another_scene(rng, scene, pools[held]) for scene, held in zip(scenes, held_out, strict=True)]
    tensors = {
        "pictures": pictures,
        "prompts": _read(encoders, [scene.prompt for scene in scenes]),
        "others": _read(encoders, [scene.prompt for scene in others]),
        "held_out": torch.tensor(held_out),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, args.output)


if __name__ == "__main__":
    main()
