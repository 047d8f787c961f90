"""This script measures the alignment score on the demo model's concepts, which it never saw, and its pictures.

Both are degraded too.

python -m dma_diffusers.eval.alignment_training.measure package pipelines/demo/contact_sheet.webp
"""

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image, ImageFilter

from dma_diffusers.eval.metrics.alignment import AlignmentScorer
from dma_diffusers.pipelines.demo_training.batches import collate
from dma_diffusers.pipelines.demo_training.concepts import BACKGROUNDS, SEEN, plural, with_article
from dma_diffusers.pipelines.demo_training.contact_sheet import cells
from dma_diffusers.pipelines.demo_training.prompts import held_out_scenes
from dma_diffusers.pipelines.demo_training.render import SceneRenderer
from dma_diffusers.pipelines.demo_training.scenes import Mention, Scene
from dma_diffusers.pipelines.demo_training.sprites import ICON_SET, render_icon

_NOISE = (0, 8, 16, 32, 64, 128)
_BLUR = (0, 1, 2, 4, 8, 16)


def concept_pictures(package: Path) -> torch.Tensor:
    """Return each of the demo model's concepts alone on white, uint8 `[204, 3, 256, 256]`."""
    icons = json.loads((package / "json" / f"{ICON_SET}.json").read_text())
    renderer = SceneRenderer(
        np.stack([render_icon(icons, icon) for icon in SEEN.values()]), torch.device("cpu")
    )
    mentions = [Mention(concept, None, concept, ((0.5, 0.5, 0.6),)) for concept in SEEN]
    scenes = [Scene(with_article(mention.noun), "alone", "white", (mention,)) for mention in mentions]
    drawn = torch.cat([renderer(collate([scene]), 256) for scene in scenes])
    return ((drawn + 1) * 127.5).round().to(torch.uint8)


def similarities(scorer: AlignmentScorer, pictures: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """Score every picture with every prompt, `[pictures, prompts]`."""
    seen = torch.cat([scorer.heads.picture(scorer.frozen.see(part)) for part in pictures.split(8)])
    return 100 * seen @ scorer.heads.text(scorer.frozen.read(prompts)).T


def auc(scores: torch.Tensor) -> float:
    """Return how often a picture scores higher with its own prompt than any picture with another's."""
    matched, mismatched = scores.diag(), scores[~torch.eye(len(scores), dtype=torch.bool)]
    return (matched[:, None] > mismatched).float().mean().item()


def noisy(pictures: torch.Tensor, deviation: float) -> torch.Tensor:
    """Add Gaussian noise of that deviation, of 255."""
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    return (pictures + deviation * noise).round().clamp(0, 255).to(torch.uint8)


def blurred(pictures: torch.Tensor, radius: float) -> torch.Tensor:
    """Blur pictures by a Gaussian of that deviation in pixels."""
    images = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pictures]
    arrays = [np.asarray(image.filter(ImageFilter.GaussianBlur(radius))) for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def altered(scene: Scene, rng: Random) -> dict[str, str]:
    """Return the scene's prompt with one thing wrong, as what is wrong -> prompt."""
    prompts = {}
    first = scene.mentions[0]
    stranger = rng.choice([concept for concept in SEEN if all(concept != m.concept for m in scene.mentions)])
    noun = stranger if first.noun == first.concept else plural(stranger)
    prompts["another object"] = _renamed(scene.prompt, {first.noun: noun})
    if scene.prompt.endswith(" background"):
        colour = rng.choice([colour for colour in BACKGROUNDS if colour != scene.background])
        prompts["another background"] = _renamed(
            scene.prompt, {f"{scene.background} background": f"{colour} background"}
        )
    singular = [m.noun for m in scene.mentions if m.noun == m.concept]
    if len(singular) > 1:
        one, other = singular[:2]
        prompts["objects exchanged"] = _renamed(scene.prompt, {one: other, other: one})
    return prompts


def _renamed(prompt: str, names: dict[str, str]) -> str:
    pattern = "|".join(rf"\b{re.escape(name)}\b" for name in names)
    return re.sub(
        r"\ban? (\w+)", lambda m: with_article(m[1]), re.sub(pattern, lambda m: names[m[0]], prompt)
    )


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("package", type=Path, help="unpacked npm package @iconify/json 2.2.535")
    parser.add_argument("sheet", type=Path, help="pictures of the first 64 held-out prompts")
    args = parser.parse_args()

    scorer = AlignmentScorer("cpu")
    names = [with_article(concept) for concept in SEEN]
    scores = similarities(scorer, concept_pictures(args.package), names)
    better = (scores > scores.diag()[:, None]).sum(1)
    recalls = ", ".join(f"R@{k} {(better < k).float().mean():.3f}" for k in (1, 5, 10))
    print(f"{len(names)} concepts: {recalls}, AUC {auc(scores):.3f}")

    scenes = held_out_scenes(64)
    prompts = [scene.prompt for scene in scenes]
    pictures = cells(Image.open(args.sheet), len(prompts))
    scores = similarities(scorer, pictures, prompts)
    matched, count = scores.diag().mean(), len(prompts)
    mismatched = (scores.sum() - scores.trace()) / (count * (count - 1))
    first = (scores.argmax(1) == torch.arange(count)).float().mean()
    print(
        f"{count} pictures: AUC {auc(scores):.3f}, R@1 {first:.3f}, matched {matched:.1f}, mismatched {mismatched:.1f}"
    )
    wrong = defaultdict(list)
    rng = Random(0)
    for i, scene in enumerate(scenes):
        for what, prompt in altered(scene, rng).items():
            wrong[what].append((scores[i, i] > similarities(scorer, pictures[i : i + 1], [prompt])).item())
    for what, noticed in wrong.items():
        print(f"the true prompt scores higher than with {what}: {sum(noticed)} of {len(noticed)}")
    for name, degrade, strengths in (("noise", noisy, _NOISE), ("blur", blurred, _BLUR)):
        means = [similarities(scorer, degrade(pictures, s), prompts).diag().mean() for s in strengths]
        print(name, ", ".join(f"{s}: {mean:.1f}" for s, mean in zip(strengths, means, strict=True)))


if __name__ == "__main__":
    main()
