"""Train the demo model's autoencoder on pictures of scenes.

python -m dma_diffusers.pipelines.demo_training.train_vae --sprites .demo/sprites.npz --output .demo/vae
"""

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from dma_diffusers.pipelines.demo_training.batches import training_batches
from dma_diffusers.pipelines.demo_training.concepts import SEEN
from dma_diffusers.pipelines.demo_training.model import FULL_RESOLUTION
from dma_diffusers.pipelines.demo_training.render import SceneRenderer
from dma_diffusers.pipelines.demo_training.sprites import load_sprites
from dma_diffusers.pipelines.demo_training.vae import build_vae, standardise

_KL_WEIGHT = 1e-3


def reconstruction_loss(picture: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the L1 loss of pictures ``[B, 3, H, W]`` and of their gradients, at full, half and quarter size."""
    loss = 0.0
    for scale in (1, 2, 4):
        a, b = (F.avg_pool2d(t, scale) for t in (picture, target))
        loss = loss + F.l1_loss(a, b)
        loss = loss + F.l1_loss(a.diff(dim=2), b.diff(dim=2)) + F.l1_loss(a.diff(dim=3), b.diff(dim=3))
    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sprites", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder for the AutoencoderKL")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=48, help="pictures per step")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    render = SceneRenderer(load_sprites(args.sprites, list(SEEN)), device)
    vae = build_vae().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=3e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, args.steps, pct_start=0.05)
    if device.type == "cuda":
        vae.encoder.compile()
        vae.decoder.compile()

    scenes = training_batches(args.batch, args.seed, args.workers, device)
    started = time.perf_counter()
    for step in range(args.steps):
        pictures = render(next(scenes), FULL_RESOLUTION).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            posterior = vae.encode(pictures).latent_dist
            reconstruction = vae.decode(posterior.sample()).sample
        loss = reconstruction_loss(reconstruction.float(), pictures)
        kl = posterior.kl().mean() / posterior.mean[0].numel()  # in nats per latent number
        optimizer.zero_grad()
        (loss + _KL_WEIGHT * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step + 1 == args.steps:
            seconds = time.perf_counter() - started
            print(f"{step},{seconds:.0f},{loss.item():.4f},{kl.item():.3f}", flush=True)

    latents = torch.cat([_latents(vae, render(next(scenes), FULL_RESOLUTION)) for _ in range(20)])
    standardise(vae, latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3)))
    vae.save_pretrained(args.output)


@torch.no_grad()
def _latents(vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    return vae.encode(pictures).latent_dist.mean


if __name__ == "__main__":
    main()
