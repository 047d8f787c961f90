"""Draw a picture with FLUX.1-dev: "auto" takes what was measured to gain on this GPU, and the receipt says it."""

import torch
from arguments import parse
from diffusers import DiffusionPipeline

from dma_diffusers import DMAAttnProcessor, DMAConfig, report

asked = parse(model="black-forest-labs/FLUX.1-dev", steps=28, size=1024, output="flux.png")
pipe = DiffusionPipeline.from_pretrained(asked.model, dtype=asked.dtype).to(asked.device)
pipe.transformer.set_attn_processor(DMAAttnProcessor(DMAConfig.preset("auto")))

picture = pipe(
    "a red apple left of a cat on a yellow background",
    width=asked.size,
    height=asked.size,
    num_inference_steps=asked.steps,
    generator=torch.Generator().manual_seed(0),
).images[0]
picture.save(asked.output)
print(report(pipe))
