"""Turn scenes into batches of tensors, endlessly for training."""

from collections.abc import Iterator, Mapping
from random import Random
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dma_diffusers.pipelines.demo_training.concepts import BACKGROUNDS, SEEN, TINTS
from dma_diffusers.pipelines.demo_training.scenes import MAX_OBJECTS, Scene, sample_training_scene
from dma_diffusers.pipelines.demo_training.text import EOS, PAD, TEXT_TOKENS, word_ids

_CONCEPT = {word: i for i, word in enumerate(SEEN)}
_TINT = {word: i for i, word in enumerate(TINTS)}
_BACKGROUND = {word: i for i, word in enumerate(BACKGROUNDS)}


class SceneBatch(NamedTuple):
    """A batch of B scenes, with room for O = M = ``MAX_OBJECTS`` objects and mentions in each.

    An index is -1 where a scene has fewer objects or mentions. A tint of -1 leaves an object its own colours.

    Args:
        ids: int64 ``[B, TEXT_TOKENS]``, the tokens of the prompt.
        background: int64 ``[B]``.
        concept, tint: int64 ``[B, O]``, of each object.
        place: float32 ``[B, O, 3]``, the (x, y, side) of each object in canvas widths, with jitter.
        word: int64 ``[B, M]``, the position in ``ids`` of the first word of each mention's noun.
        word_tint: int64 ``[B, M]``, the tint of each mention.
        word_place: float32 ``[B, M, 3]``, the mean place of the objects that each mention means.
    """

    ids: torch.Tensor
    background: torch.Tensor
    concept: torch.Tensor
    tint: torch.Tensor
    place: torch.Tensor
    word: torch.Tensor
    word_tint: torch.Tensor
    word_place: torch.Tensor

    def to(self, device: torch.device) -> "SceneBatch":
        return SceneBatch(*(t.to(device, non_blocking=True) for t in self))


def collate(
    scenes: list[Scene], rng: Random | None = None, sprites: Mapping[str, int] = _CONCEPT
) -> SceneBatch:
    """Turn scenes into a batch; with ``rng``, objects are moved by up to .02 and scaled by up to 5 %.

    ``sprites`` maps each concept to the index of the renderer's sprite that draws it.
    """
    shape = (len(scenes), MAX_OBJECTS)
    batch = SceneBatch(
        ids=torch.full((len(scenes), TEXT_TOKENS), PAD),
        background=torch.tensor([_BACKGROUND[scene.background] for scene in scenes]),
        concept=torch.full(shape, -1),
        tint=torch.full(shape, -1),
        place=torch.zeros(*shape, 3),
        word=torch.full(shape, -1),
        word_tint=torch.full(shape, -1),
        word_place=torch.zeros(*shape, 3),
    )
    arrays = SceneBatch(*(t.numpy() for t in batch))  # writing single elements into tensors is slow
    for b, scene in enumerate(scenes):
        words = scene.prompt.split()
        arrays.ids[b, : len(words) + 1] = [*word_ids(words), EOS]
        objects = 0
        for m, mention in enumerate(scene.mentions):
            tint = _TINT[mention.tint] if mention.tint else -1
            arrays.word[b, m] = words.index(mention.noun.split()[0])
            arrays.word_tint[b, m] = tint
            arrays.word_place[b, m] = [sum(axis) / len(axis) for axis in zip(*mention.places, strict=True)]
            for x, y, side in mention.places:
                if rng:
                    x, y = x + rng.uniform(-0.02, 0.02), y + rng.uniform(-0.02, 0.02)
                    side *= rng.uniform(0.95, 1.05)
                arrays.concept[b, objects] = sprites[mention.concept]
                arrays.tint[b, objects] = tint
                arrays.place[b, objects] = (x, y, side)
                objects += 1
    return batch


class TrainingScenes(IterableDataset):
    """Yields endless batches of training scenes; every worker draws its own scenes from ``seed`` and its number."""

    def __init__(self, batch_size: int, seed: int):
        self.batch_size = batch_size
        self.seed = seed

    def __iter__(self) -> Iterator[SceneBatch]:
        worker = get_worker_info()
        rng = Random(self.seed * 1000 + (worker.id if worker else 0))
        while True:
            yield collate([sample_training_scene(rng) for _ in range(self.batch_size)], rng)


def training_batches(batch_size: int, seed: int, workers: int, device: torch.device) -> Iterator[SceneBatch]:
    """Yield endless batches of training scenes on ``device``; ``workers`` processes prepare them."""
    loader = DataLoader(
        TrainingScenes(batch_size, seed),
        batch_size=None,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        prefetch_factor=4 if workers else None,
    )
    for batch in loader:
        yield batch.to(device)
