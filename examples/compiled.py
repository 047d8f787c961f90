"""Compile the blocks of a transformer with DMA, and compile its kernels before the first picture is asked for."""

import torch
from arguments import parse
from diffusers import DiffusionPipeline

from dma_diffusers import DMAConfig, apply, report, warmup

asked = parse(model="black-forest-labs/FLUX.1-dev", steps=28, size=1024, output="compiled.png")
pipe = DiffusionPipeline.from_pretrained(asked.model, dtype=asked.dtype).to(asked.device)
apply(pipe, DMAConfig.preset("auto"))
pipe.transformer.compile_repeated_blocks(fullgraph=True)
warmup(pipe, [(asked.size, asked.size)])

picture = pipe(
    "a red apple left of a cat on a yellow background",
    width=asked.size,
    height=asked.size,
    num_inference_steps=asked.steps,
    generator=torch.Generator().manual_seed(0),
).images[0]
picture.save(asked.output)
print(report(pipe))
