"""Low precision and one of Diffusers' caches together: what they save multiplies, and what they lose hardly adds."""

from arguments import parse
from diffusers import DiffusionPipeline, FirstBlockCacheConfig

from dma_diffusers import DMAConfig, apply, report

asked = parse("black-forest-labs/FLUX.1-dev", "cache.png", width=2048, height=2048, num_inference_steps=28)
pipe = DiffusionPipeline.from_pretrained(asked.model, dtype=asked.dtype).to(asked.device)
pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
apply(pipe, DMAConfig.preset("auto"))

picture = pipe("a red apple left of a cat on a yellow background", **asked.call).images[0]
picture.save(asked.output)
print(report(pipe))
