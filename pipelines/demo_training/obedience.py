"""Measure how often drawn pictures show what held-out prompts say.

For each object of a scene, the renderer draws every concept at the place where the prompt wants the object. The object
counts as right if the named concept is the one nearest to the picture there. A tint counts as right if the named tint
is nearer to the picture than all other tints and than no tint. In scenes with several mentions, the layout counts as
right if no exchange of their places is nearer to the picture.

python -m dma_diffusers.pipelines.demo_training.obedience pipelines/demo/flux --sprites .demo/sprites.npz
"""

import argparse
import json
from itertools import permutations
from pathlib import Path

import torch
import torch.nn.functional as F

from dma_diffusers.pipelines.demo_training.batches import SceneBatch, collate
from dma_diffusers.pipelines.demo_training.concepts import SEEN, TINTS
from dma_diffusers.pipelines.demo_training.drawing import draw
from dma_diffusers.pipelines.demo_training.prompts import held_out_scenes
from dma_diffusers.pipelines.demo_training.render import SceneRenderer
from dma_diffusers.pipelines.demo_training.scenes import Scene
from dma_diffusers.pipelines.demo_training.sprites import load_sprites

_SIDE = 64  # pictures are compared at this side in pixels
_SHIFTS = range(-2, 3)  # a picture may be off by so many pixels


def repeated(scene: SceneBatch, count: int) -> SceneBatch:
    """Repeat one scene to a batch of ``count``."""
    return SceneBatch(*(t.expand(count, *t.shape[1:]).clone() for t in scene))


def nearest(picture: torch.Tensor, candidates: torch.Tensor, where=(slice(None), slice(None))) -> int:
    """Return which candidate ``[N, 3, H, W]`` is nearest to the picture ``[3, H, W]``.

    The distance is the L1 norm within ``where`` (slices of rows and columns), at the best shift.
    """
    rows, columns = where
    candidates = candidates[:, :, rows, columns]
    shifted = (picture.roll((dy, dx), (1, 2))[:, rows, columns] for dy in _SHIFTS for dx in _SHIFTS)
    distances = torch.stack([(candidates - s).abs().mean((1, 2, 3)) for s in shifted])
    return distances.amin(0).argmin().item()


def window(place: torch.Tensor) -> tuple[slice, slice]:
    """Return the rows and columns that an object at ``place`` (x, y, side in canvas widths) covers."""
    x, y, side = (place * _SIDE).tolist()
    return tuple(slice(max(0, round(c - side / 2)), round(c + side / 2)) for c in (y, x))


def right_objects(picture: torch.Tensor, scene: SceneBatch, render: SceneRenderer) -> list[bool]:
    """Tell for each object of the scene (a batch of one) if its concept is the nearest one at its place."""
    right = []
    for i in range(int((scene.concept[0] >= 0).sum())):
        candidates = repeated(scene, len(SEEN))
        candidates.concept[:, i] = torch.arange(len(SEEN), device=picture.device)
        found = nearest(picture, render(candidates, _SIDE), window(scene.place[0, i]))
        right.append(found == scene.concept[0, i].item())
    return right


def right_tints(picture: torch.Tensor, scene: SceneBatch, render: SceneRenderer) -> list[bool]:
    """Tell for each object of the scene (a batch of one) that has a tint if that tint is the nearest one."""
    right = []
    for i in torch.nonzero(scene.tint[0] >= 0).flatten().tolist():
        candidates = repeated(scene, len(TINTS) + 1)
        candidates.tint[:, i] = torch.arange(-1, len(TINTS), device=picture.device)
        found = nearest(picture, render(candidates, _SIDE), window(scene.place[0, i]))
        right.append(found - 1 == scene.tint[0, i].item())
    return right


def right_layout(picture: torch.Tensor, scene: Scene, render: SceneRenderer) -> bool | None:
    """Tell if the layout that the prompt wants is nearer than all exchanges of places; None for a single mention."""
    count = len(scene.mentions)
    if count == 1:
        return None
    orders = list(permutations(range(count)))  # the first permutation changes nothing
    candidates = repeated(collate([scene]).to(picture.device), len(orders))
    for candidate, order in enumerate(orders):
        candidates.place[candidate, :count] = candidates.place[candidate, list(order)]
    return nearest(picture, render(candidates, _SIDE)) == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("--sprites", type=Path, required=True)
    parser.add_argument(
        "--count", type=int, default=64, help="number of prompts; the first 64 are those of prompts.jsonl"
    )
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scenes = held_out_scenes(args.count)
    pictures = torch.from_numpy(draw(args.pipeline, [scene.prompt for scene in scenes])).to(device)
    pictures = F.interpolate(pictures.permute(0, 3, 1, 2) * 2 - 1, (_SIDE, _SIDE), mode="area")
    # Objects are small at this side, so a third of the sprites' size is enough.
    sprites = load_sprites(args.sprites, list(SEEN))[:, ::3, ::3]
    render = SceneRenderer(sprites, device)
    objects, tints, layouts, whole = [], [], [], []
    for picture, scene in zip(pictures, scenes, strict=True):
        batch = collate([scene]).to(device)
        found, coloured = right_objects(picture, batch, render), right_tints(picture, batch, render)
        layout = right_layout(picture, scene, render)
        objects += found
        tints += coloured
        layouts += [] if layout is None else [layout]
        whole.append(all(found) and all(coloured) and layout is not False)
    shares = {"objects": objects, "tints": tints, "layouts": layouts, "scenes": whole}
    print(json.dumps({name: {"right": sum(r), "of": len(r)} for name, r in shares.items()}))


if __name__ == "__main__":
    main()
