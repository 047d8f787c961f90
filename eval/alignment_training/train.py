"""Train the heads of the alignment score on stored features.

python -m dma_diffusers.eval.alignment_training.train .alignment/features.safetensors \
    eval/metrics/alignment.safetensors
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import nn

from dma_diffusers.eval.metrics.alignment import Heads
from dma_diffusers.pipelines.files import write_atomically

_BATCH = 256
_LEARNING_RATE = 2e-3
_WEIGHT_DECAY = 0.05
_AMONG = 64


def contrastive_loss(pictures, prompts, others, scale) -> torch.Tensor:
    """Return the loss of finding each picture's prompt among all prompts and all others, and each prompt's picture.

    Args:
        pictures, prompts, others: `[B, 256]` embeddings of length 1; an other is a prompt for the same things
            arranged otherwise.
        scale: what cosines are multiplied by.
    """
    target = torch.arange(len(pictures))
    among_prompts = pictures @ torch.cat([prompts, others]).T * scale
    among_pictures = prompts @ pictures.T * scale
    return (F.cross_entropy(among_prompts, target) + F.cross_entropy(among_pictures, target)) / 2


@torch.no_grad()
def validate(heads: Heads, pictures, prompts, others) -> str:
    """Return how often a picture's own prompt is the first of `_AMONG`, and before the other for the same things."""
    heads.eval()
    seen, read, other = heads.picture(pictures.float()), heads.text(prompts), heads.text(others)
    heads.train()
    blocks = [(a @ b.T).argmax(1) for a, b in zip(seen.split(_AMONG), read.split(_AMONG), strict=True)]
    first = torch.cat([block == torch.arange(len(block)) for block in blocks if len(block) == _AMONG])
    before = (seen * read).sum(1) > (seen * other).sum(1)
    return f"first of {_AMONG} {first.float().mean():.3f}, before another scene {before.float().mean():.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("features", type=Path)
    parser.add_argument("output", type=Path, help="the .safetensors to write")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    stored = load_file(args.features)
    held_out = stored.pop("held_out")
    training = {name: tensor[~held_out] for name, tensor in stored.items()}
    validation = {name: tensor[held_out] for name, tensor in stored.items()}

    torch.manual_seed(args.seed)
    heads, log_scale = Heads(), nn.Parameter(torch.tensor(2.7))
    optimizer = torch.optim.AdamW(
        [{"params": heads.parameters()}, {"params": [log_scale], "weight_decay": 0}],
        lr=_LEARNING_RATE,
        weight_decay=_WEIGHT_DECAY,
    )
    count = int((~held_out).sum())
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, _LEARNING_RATE, total_steps=args.epochs * (count // _BATCH), pct_start=0.1
    )
    for epoch in range(args.epochs):
        for batch in torch.randperm(count).split(_BATCH)[: count // _BATCH]:
            pictures = heads.picture(training["pictures"][batch].float())
            prompts, others = heads.text(training["prompts"][batch]), heads.text(training["others"][batch])
            loss = contrastive_loss(pictures, prompts, others, log_scale.exp())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(
            f"epoch {epoch + 1}: loss {loss.item():.3f}, validation: {validate(heads, **validation)}",
            flush=True,
        )
    write_atomically(args.output, save({name: value.half() for name, value in heads.state_dict().items()}))


if __name__ == "__main__":
    main()
