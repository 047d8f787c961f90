"""Describe clips as tensors of indices, and draw their pixels on the device."""

from typing import NamedTuple

import numpy as np
import torch

from dma_diffusers.pipelines.demo_training.render import colour_table, mipmaps, sample
from dma_diffusers.pipelines.demo_video_training.concepts import BACKGROUNDS, CONCEPTS
from dma_diffusers.pipelines.demo_video_training.motions import MOTIONS, poses
from dma_diffusers.pipelines.demo_video_training.prompts import is_held_out

HEIGHT, WIDTH = 128, 192


class Clips(NamedTuple):
    """A batch of B clips.

    Args:
        concept, motion, background: int64 ``[B]``.
        jitter: float32 ``[B, 3]``, added to x and y (in canvas heights), and the relative change of the object's side.
    """

    concept: torch.Tensor
    motion: torch.Tensor
    background: torch.Tensor
    jitter: torch.Tensor


class TrainingClips:
    """Chooses random clips that are not held out, on ``device``."""

    def __init__(self, device: torch.device):
        pairs = [(c, m) for c, concept in enumerate(CONCEPTS) for m, motion in enumerate(MOTIONS)
                 if not is_held_out(concept, motion)]  # fmt: skip
        self.pairs = torch.tensor(pairs, device=device)
        self.limits = torch.tensor([0.03, 0.03, 0.05], device=device)

    def __call__(self, count: int) -> Clips:
        """Choose ``count`` clips; objects are moved by up to .03 and scaled by up to 5 %."""
        device = self.pairs.device
        concept, motion = self.pairs[torch.randint(len(self.pairs), (count,), device=device)].unbind(1)
        background = torch.randint(len(BACKGROUNDS), (count,), device=device)
        return Clips(concept, motion, background, (torch.rand(count, 3, device=device) * 2 - 1) * self.limits)


class ClipRenderer:
    """Draws clips from sprites.

    Args:
        sprites: uint8 ``[concepts, FRAMES, S, S, 4]`` with straight alpha; S is a multiple of 8.
        device: the device to draw on.
    """

    def __init__(self, sprites: np.ndarray, device: torch.device):
        rgba = torch.from_numpy(sprites).to(device).flatten(0, 1).permute(0, 3, 1, 2).float() / 255
        rgba[:, :3] *= rgba[:, 3:]  # interpolation needs premultiplied colours
        self.size = rgba.shape[-1]
        self.textures = mipmaps(rgba).unflatten(0, sprites.shape[:2])
        self.backgrounds = colour_table(BACKGROUNDS, device)
        self.poses = torch.from_numpy(poses()).float().to(device)

    @torch.no_grad()
    def __call__(self, clips: Clips, frames: range, height: int = HEIGHT) -> torch.Tensor:
        """Draw ``frames`` of ``clips``; returns float32 ``[B, 3, len(frames), height, height * 3 / 2]`` in [-1, 1]."""
        width, count = height * WIDTH // HEIGHT, len(frames)
        index = torch.arange(frames.start, frames.stop, frames.step, device=clips.motion.device)
        pose = self.poses[clips.motion][:, index]  # [B, frames, 4]
        x, y = (pose[..., :2] + clips.jitter[:, None, :2]).flatten(0, 1)[..., None, None].unbind(1)
        side = (pose[..., 2] * (1 + clips.jitter[:, 2:])).flatten()
        angle = (pose[..., 3] * 2 * torch.pi).flatten()[:, None, None]

        rows = ((torch.arange(height, device=index.device) + 0.5) / height - 0.5)[:, None] - y
        columns = ((torch.arange(width, device=index.device) + 0.5 - width / 2) / height) - x
        u = (columns * angle.cos() + rows * angle.sin()) / side[:, None, None] + 0.5
        v = (rows * angle.cos() - columns * angle.sin()) / side[:, None, None] + 0.5
        textures = self.textures[clips.concept[:, None], index].flatten(0, 1)
        rgb, alpha = sample(textures, u, v, torch.log2(self.size / (side * height))).split([3, 1], dim=1)
        background = self.backgrounds[clips.background].repeat_interleave(count, dim=0)[:, :, None, None]
        pictures = background * (1 - alpha) + rgb
        return (pictures * 2 - 1).unflatten(0, (-1, count)).transpose(1, 2)
