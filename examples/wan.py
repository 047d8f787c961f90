"""Draw a clip with Wan 2.1: every tile LOW in INT8, nothing skipped."""

import torch
from arguments import parse
from diffusers import DiffusionPipeline
from diffusers.utils import export_to_gif

from dma_diffusers import apply, report

asked = parse(
    model="Wan-AI/Wan2.1-T2V-14B-Diffusers", steps=50, width=1280, height=720, frames=81, output="wan.gif"
)
pipe = DiffusionPipeline.from_pretrained(asked.model, dtype=asked.dtype).to(asked.device)
apply(pipe, high="bf16", low="int8", policy="dense(everywhere=low)")

clip = pipe(
    "a red car moving left on a grey background",
    width=asked.width,
    height=asked.height,
    num_frames=asked.frames,
    num_inference_steps=asked.steps,
    generator=torch.Generator().manual_seed(0),
    output_type="pil",
).frames[0]
export_to_gif(clip, asked.output, fps=16)
print(report(pipe))
