"""Draw with Qwen-Image, with attention and linear layers in 8 bits: its linear layers take most of a step."""

import torch
from arguments import parse
from diffusers import DiffusionPipeline

from dma_diffusers import DMAConfig, apply, quantize_linears, report

asked = parse(model="Qwen/Qwen-Image", steps=50, size=1328, output="qwen.png")
pipe = DiffusionPipeline.from_pretrained(asked.model, dtype=asked.dtype).to(asked.device)
quantize_linears(
    pipe, "fp8"
)  # layers that are published as sensitive stay as they are; the receipt names them
apply(pipe, DMAConfig.preset("auto"))

picture = pipe(
    "a big penguin between a red zebra and a small peach",
    width=asked.size,
    height=asked.size,
    num_inference_steps=asked.steps,
    generator=torch.Generator().manual_seed(0),
).images[0]
picture.save(asked.output)
print(report(pipe))
