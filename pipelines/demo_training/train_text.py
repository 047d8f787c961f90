"""Teach the text encoders to parse prompts, before the transformer is trained.

python -m dma_diffusers.pipelines.demo_training.train_text --output .demo/text.safetensors
"""

import argparse
import time
from pathlib import Path

import torch
from safetensors.torch import save_model

from dma_diffusers.pipelines.demo_training.batches import training_batches
from dma_diffusers.pipelines.demo_training.text import TextEncoders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output", type=Path, required=True, help="safetensors file for the encoders and their heads"
    )
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoders = TextEncoders().to(device)
    optimizer = torch.optim.AdamW(encoders.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, args.steps, pct_start=0.1)
    kept = torch.ones(args.batch, device=device)

    batches = training_batches(args.batch, args.seed, args.workers, device)
    started = time.perf_counter()
    for step in range(args.steps):
        scenes = next(batches)
        with torch.autocast(device.type, torch.bfloat16):
            tokens, pooled = encoders(scenes.ids)
            loss = encoders.parse_loss(tokens, pooled, scenes, kept)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(encoders.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step + 1 == args.steps:
            print(f"{step},{time.perf_counter() - started:.0f},{loss.item():.4f}", flush=True)
    save_model(encoders, args.output)


if __name__ == "__main__":
    main()
