"""Train the transformer and the text encoder by flow matching, from scratch or from saved weights.

python -m dma_diffusers.pipelines.demo_video_training.train --sprites .demo/animated.npz --vae .demo/video_vae \
    --height 64 --frame-stride 2 --batch 256 --shift 2 --seconds 130 --output .demo/video_low
"""

import argparse
from copy import deepcopy
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_model, save_model

from dma_diffusers.pipelines.demo_training.train import build_optimizers, shifted
from dma_diffusers.pipelines.demo_video_training.clips import HEIGHT, WIDTH, ClipRenderer, TrainingClips
from dma_diffusers.pipelines.demo_video_training.model import SpreadPositions, VideoModel
from dma_diffusers.pipelines.demo_video_training.motions import FRAMES
from dma_diffusers.pipelines.demo_video_training.sprites import load_sprites
from dma_diffusers.pipelines.demo_video_training.timed import Log, set_learning_rate, timed_steps
from dma_diffusers.pipelines.demo_video_training.vae import encode, whole_clips

_DROPPED_PROMPTS = 0.1
_WARMUP_STEPS = 100


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sprites", type=Path, required=True)
    parser.add_argument("--vae", type=Path, required=True, help="folder of the autoencoder")
    parser.add_argument("--init", type=Path, help="weights of an earlier run to start from")
    parser.add_argument("--output", type=Path, required=True, help="folder for model.safetensors and log.csv")
    parser.add_argument("--height", type=int, default=HEIGHT, help="height of the clips in pixels")
    parser.add_argument("--frame-stride", type=int, default=1, help="2 takes every second frame")
    parser.add_argument("--shift", type=float, default=3.0, help="shift towards higher noise levels")
    parser.add_argument(
        "--seconds", type=float, default=150, help="time to train for, compilation not counted"
    )
    parser.add_argument("--batch", type=int, default=32, help="clips per step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--decay", type=float, default=0.0, help="share of the time in which lr falls to 0")
    parser.add_argument(
        "--average", type=float, default=0.998, help="decay of the averaged weights, per step"
    )
    parser.add_argument("--save-every", type=int, default=500, help="steps between saved weights")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward pass is wrong in PyTorch 2.11
    torch.backends.cuda.matmul.allow_tf32 = True

    model = VideoModel()
    if args.init:
        load_model(model, args.init)
    frames = range(0, FRAMES, args.frame_stride)
    grid = ((len(frames) - 1) // 4 + 1, args.height // 8, args.height * WIDTH // HEIGHT // 8)
    stride = (args.frame_stride, HEIGHT // args.height)
    model.transformer.rope = SpreadPositions(grid, stride, model.transformer.config.attention_head_dim)
    model.to(device)
    average = deepcopy(model)
    optimizers = build_optimizers(model, args.lr)
    vae = AutoencoderKLWan.from_pretrained(args.vae)
    vae = whole_clips(vae).to(device)
    mean, deviation = (
        torch.tensor(vae.config[name], device=device)[:, None, None, None]
        for name in ("latents_mean", "latents_std")
    )
    if device.type == "cuda":
        model.transformer.compile_repeated_blocks(fullgraph=True)
        vae.encoder.compile()

    draw, render = TrainingClips(device), ClipRenderer(load_sprites(args.sprites), device)
    args.output.mkdir(parents=True, exist_ok=True)
    log = Log(args.output / "log.csv")
    for step, share in timed_steps(args.seconds):
        falling = (1 - share) / args.decay if args.decay else 1.0
        set_learning_rate(optimizers, min(1.0, (step + 1) / _WARMUP_STEPS, falling))
        clips = draw(args.batch)
        with torch.autocast(device.type, torch.bfloat16):
            with torch.no_grad():
                pictures = render(clips, frames, args.height).contiguous(memory_format=torch.channels_last_3d)
                latents = (encode(vae, pictures).mean.float() - mean) / deviation
            sigma = shifted(torch.rand(args.batch, device=device), args.shift)
            dropped = torch.rand(args.batch, device=device) < _DROPPED_PROMPTS
            loss = model(clips, latents, torch.randn_like(latents), sigma, dropped)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - args.average)

        if step % 50 == 0 or share == 1:
            log(step, str((step + 1) * args.batch), f"{loss.item():.4f}")
        if step % args.save_every == args.save_every - 1 or share == 1:
            partial = args.output / "partial.safetensors"
            save_model(deepcopy(average).bfloat16(), partial)
            partial.rename(args.output / "model.safetensors")


if __name__ == "__main__":
    main()
