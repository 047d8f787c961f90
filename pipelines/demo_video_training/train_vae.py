"""Train the demo video model's autoencoder on clips.

python -m dma_diffusers.pipelines.demo_video_training.train_vae --sprites .demo/animated.npz --output .demo/video_vae
"""

import argparse
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan

from dma_diffusers.pipelines.demo_training.muon import Muon
from dma_diffusers.pipelines.demo_training.train_vae import reconstruction_loss
from dma_diffusers.pipelines.demo_video_training.clips import HEIGHT, ClipRenderer, TrainingClips
from dma_diffusers.pipelines.demo_video_training.motions import FRAMES
from dma_diffusers.pipelines.demo_video_training.sprites import load_sprites
from dma_diffusers.pipelines.demo_video_training.timed import Log, set_learning_rate, timed_steps
from dma_diffusers.pipelines.demo_video_training.vae import build_vae, decode, encode, whole_clips

_KL_WEIGHT = 3e-4
_WINDOW = 17  # a training clip has so many frames
_WARMUP_STEPS = 50


def video_loss(clips: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the picture loss of every frame of clips ``[B, 3, T, H, W]``, plus the L1 loss of frame differences."""
    frames, target_frames = (t.transpose(1, 2).flatten(0, 1) for t in (clips, targets))
    return reconstruction_loss(frames, target_frames) + F.l1_loss(clips.diff(dim=2), targets.diff(dim=2))


def build_optimizers(vae: AutoencoderKLWan, lr: float) -> list[torch.optim.Optimizer]:
    """Build Muon for the kernels between the first and the last convolutions, and AdamW for everything else."""
    outer = (
        "encoder.conv_in",
        "encoder.conv_out",
        "decoder.conv_in",
        "decoder.conv_out",
        "quant_conv",
        "gamma",
    )
    kernels, others = [], []
    for name, param in vae.named_parameters():
        is_kernel = param.ndim >= 4 and not any(part in name for part in outer)
        (kernels if is_kernel else others).append(param)
    return [Muon(kernels, lr), torch.optim.AdamW(others, 1.5 * lr, betas=(0.9, 0.99), weight_decay=0.0)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sprites", type=Path, required=True)
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for the AutoencoderKLWan and log.csv"
    )
    parser.add_argument("--init", type=Path, help="folder of an autoencoder to start from")
    parser.add_argument(
        "--seconds", type=float, default=90, help="time to train for, compilation not counted"
    )
    parser.add_argument("--batch", type=int, default=16, help="clips per step")
    parser.add_argument("--height", type=int, default=HEIGHT, help="height of the clips in pixels")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward pass is wrong in PyTorch 2.11
    draw, render = TrainingClips(device), ClipRenderer(load_sprites(args.sprites), device)
    vae = AutoencoderKLWan.from_pretrained(args.init) if args.init else build_vae()
    vae = whole_clips(vae).to(device)
    optimizers = build_optimizers(vae, args.lr)
    if device.type == "cuda":
        vae.encoder.compile()
        vae.decoder.compile()

    args.output.mkdir(parents=True, exist_ok=True)
    log, windows = Log(args.output / "log.csv"), Random(args.seed)
    for step, share in timed_steps(args.seconds):
        set_learning_rate(optimizers, min(1, (step + 1) / _WARMUP_STEPS, 1.6 * (1 - share) + 0.01))
        stride = windows.choice((1, 1, 2))  # the transformer is first trained on every second frame
        start = windows.randrange(FRAMES - stride * (_WINDOW - 1))
        frames = range(start, start + stride * _WINDOW, stride)
        clips = render(draw(args.batch), frames, args.height).contiguous(memory_format=torch.channels_last_3d)
        with torch.autocast(device.type, torch.bfloat16):
            posterior = encode(vae, clips)
            reconstruction = decode(vae, posterior.sample())
        loss = video_loss(reconstruction.float(), clips)
        kl = posterior.kl().mean() / posterior.mean[0].numel()  # in nats per latent number
        vae.zero_grad()
        (loss + _KL_WEIGHT * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if step % 50 == 0 or share == 1:
            log(step, f"{loss.item():.4f}", f"{kl.item():.3f}")
        if step % 500 == 499 or share == 1:
            set_statistics(
                vae,
                torch.cat([_latents(vae, render(draw(args.batch), frames, args.height)) for _ in range(8)]),
            )
            vae.save_pretrained(args.output)


@torch.no_grad()
def _latents(vae: AutoencoderKLWan, clips: torch.Tensor) -> torch.Tensor:
    return encode(vae, clips.contiguous(memory_format=torch.channels_last_3d)).mean


def set_statistics(vae: AutoencoderKLWan, latents: torch.Tensor) -> None:
    """Write each channel's mean and deviation over latents ``[B, C, T, H, W]`` into the configuration."""
    deviation, mean = torch.std_mean(latents.float(), dim=(0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=deviation.tolist())


if __name__ == "__main__":
    main()
