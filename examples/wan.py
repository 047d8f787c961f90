"""Draw a clip with Wan 2.1: every tile LOW in INT8, nothing skipped."""

from arguments import parse
from diffusers import DiffusionPipeline
from diffusers.utils import export_to_gif

from dma_diffusers import apply, report

asked = parse(
    "Wan-AI/Wan2.1-T2V-14B-Diffusers",
    "wan.gif",
    width=1280,
    height=720,
    num_frames=81,
    num_inference_steps=50,
)
pipe = DiffusionPipeline.from_pretrained(asked.model, dtype=asked.dtype).to(asked.device)
apply(pipe, high="bf16", low="int8", policy="dense(everywhere=low)")

clip = pipe("a red car moving left on a grey background", output_type="pil", **asked.call).frames[0]
export_to_gif(clip, asked.output, fps=16)
print(report(pipe))
