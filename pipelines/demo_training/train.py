"""Train the transformer and the text encoders by flow matching, from scratch or from saved weights.

torchrun --nproc_per_node 4 -m dma_diffusers.pipelines.demo_training.train \
    --sprites .demo/sprites.npz --vae .demo/vae --text .demo/text.safetensors \
    --resolution 128 --steps 9000 --output .demo/low
"""

import argparse
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import AutoencoderKL
from safetensors.torch import load_model, save_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dma_diffusers.pipelines.demo_training.batches import training_batches
from dma_diffusers.pipelines.demo_training.concepts import SEEN
from dma_diffusers.pipelines.demo_training.model import DemoModel, image_ids
from dma_diffusers.pipelines.demo_training.muon import Muon
from dma_diffusers.pipelines.demo_training.render import SceneRenderer
from dma_diffusers.pipelines.demo_training.sprites import load_sprites

_PARSE_WEIGHT = 0.1
_DROPPED_PROMPTS = 0.1
_WARMUP_STEPS = 200


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sprites", type=Path, required=True)
    parser.add_argument("--vae", type=Path, required=True, help="folder of the autoencoder")
    parser.add_argument("--text", type=Path, help="text encoders of train_text to start from")
    parser.add_argument("--init", type=Path, help="weights of an earlier run to start from")
    parser.add_argument("--output", type=Path, required=True, help="folder for model.safetensors and log.csv")
    parser.add_argument("--resolution", type=int, default=128, help="side of the pictures in pixels")
    parser.add_argument("--shift", type=float, default=2.0, help="shift towards higher noise levels")
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--batch", type=int, default=512, help="pictures per step on each GPU")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--decay", type=float, default=0.0, help="share of the steps in which lr falls to 0")
    parser.add_argument("--save-every", type=int, default=1000, help="steps between saved weights")
    parser.add_argument("--workers", type=int, default=8, help="processes per GPU that make batches")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def build_optimizers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Build Muon for the matrices of attention and feed-forward layers, and AdamW for everything else."""
    matrices, others = [], []
    for name, param in model.named_parameters():
        in_block = any(part in name for part in ("blocks.", "encoder.block.", "encoder.layers."))
        is_matrix = param.ndim == 2 and "norm" not in name and "bias" not in name
        (matrices if in_block and is_matrix else others).append(param)
    return [
        Muon(matrices, lr, weight_decay=0.05),
        torch.optim.AdamW(others, lr / 2, betas=(0.9, 0.99), weight_decay=0.0),
    ]


def learning_rate(step: int, steps: int, decay: float) -> float:
    """Return the factor of the learning rate: it warms up linearly, stays constant, and falls linearly at the end.

    ``decay`` is the share of the steps in which it falls to 0.
    """
    falling = (steps - step) / (decay * steps) if decay else 1.0
    return min(1.0, (step + 1) / _WARMUP_STEPS, falling)


def shifted(uniform: torch.Tensor, shift: float) -> torch.Tensor:
    """Turn uniform numbers into noise levels in (0, 1), with the shift of FlowMatchEulerDiscreteScheduler."""
    return shift * uniform / (1 + (shift - 1) * uniform)


def main() -> None:
    args = parse_arguments()
    rank, gpus = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)  # its backward pass is wrong in PyTorch 2.11
        torch.backends.cuda.matmul.allow_tf32 = True
    if gpus > 1:
        dist.init_process_group("nccl" if cuda else "gloo")

    torch.manual_seed(args.seed)
    model = DemoModel().to(device)
    if args.text:
        load_model(model.text, args.text, device=str(device))
    if args.init:
        load_model(model, args.init, device=str(device))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    optimizers = build_optimizers(model, args.lr)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda step: learning_rate(step, args.steps, args.decay))
        for o in optimizers
    ]
    vae = AutoencoderKL.from_pretrained(args.vae).to(device, memory_format=torch.channels_last)
    if cuda:
        model.transformer.compile_repeated_blocks(fullgraph=True)
        model.text.t5.compile()
        vae.encoder.compile()
    training = DistributedDataParallel(model, device_ids=[device] if cuda else None) if gpus > 1 else model

    torch.manual_seed(args.seed + 1 + rank)
    render = SceneRenderer(load_sprites(args.sprites, list(SEEN)), device)
    positions = image_ids(args.resolution, device)
    batches = training_batches(args.batch, args.seed * gpus + rank, args.workers, device)
    args.output.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    for step in range(args.steps):
        scenes = next(batches)
        with torch.autocast(device.type, torch.bfloat16):
            with torch.no_grad():
                latents = vae.encode(render(scenes, args.resolution)).latent_dist.mean.float()
            sigma = shifted(torch.rand(args.batch, device=device), args.shift)
            dropped = torch.rand(args.batch, device=device) < _DROPPED_PROMPTS
            flow, parse = training(scenes, latents, torch.randn_like(latents), sigma, dropped, positions)
        model.zero_grad()
        (flow + _PARSE_WEIGHT * parse).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        average.update_parameters(model)

        last = step + 1 == args.steps
        if rank == 0 and (step % 100 == 0 or last):
            seconds = time.perf_counter() - started
            line = (
                f"{step},{seconds:.0f},{(step + 1) * args.batch * gpus},{flow.item():.4f},{parse.item():.4f}"
            )
            print(line, flush=True)
            with (args.output / "log.csv").open("a") as log:
                print(line, file=log)
        if rank == 0 and (last or (step + 1) % args.save_every == 0):
            partial = args.output / "partial.safetensors"
            save_model(average.module, partial)
            partial.rename(args.output / "model.safetensors")
    if gpus > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
