"""Compile the blocks of a transformer with DMA, and compile its kernels before the first picture is asked for."""

from arguments import parse
from diffusers import DiffusionPipeline

from dma_diffusers import DMAConfig, apply, report, warmup

asked = parse("black-forest-labs/FLUX.1-dev", "compiled.png", width=1024, height=1024, num_inference_steps=28)
pipe = DiffusionPipeline.from_pretrained(asked.model, dtype=asked.dtype).to(asked.device)
apply(pipe, DMAConfig.preset("auto"))
pipe.transformer.compile_repeated_blocks(fullgraph=True)
warmup(pipe, [(asked.call["width"], asked.call["height"])])

picture = pipe("a red apple left of a cat on a yellow background", **asked.call).images[0]
picture.save(asked.output)
print(report(pipe))
