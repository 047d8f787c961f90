"""Low precision and one of Diffusers' caches together: what they save multiplies, and what they lose hardly adds."""

import torch
from arguments import parse
from diffusers import DiffusionPipeline, FirstBlockCacheConfig

from dma_diffusers import DMAConfig, apply, report

asked = parse(model="black-forest-labs/FLUX.1-dev", steps=28, size=2048, output="cache.png")
pipe = DiffusionPipeline.from_pretrained(asked.model, dtype=asked.dtype).to(asked.device)
pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
apply(pipe, DMAConfig.preset("auto"))

picture = pipe(
    "a red apple left of a cat on a yellow background",
    width=asked.size,
    height=asked.size,
    num_inference_steps=asked.steps,
    generator=torch.Generator().manual_seed(0),
).images[0]
picture.save(asked.output)
print(report(pipe))
