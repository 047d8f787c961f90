"""Draw a picture with FLUX.1-dev: "auto" takes what was measured to gain on this GPU, and the receipt says it."""

from arguments import parse
from diffusers import DiffusionPipeline

from dma_diffusers import DMAAttnProcessor, DMAConfig, report

asked = parse("black-forest-labs/FLUX.1-dev", "flux.png", width=1024, height=1024, num_inference_steps=28)
pipe = DiffusionPipeline.from_pretrained(asked.model, dtype=asked.dtype).to(asked.device)
pipe.transformer.set_attn_processor(DMAAttnProcessor(DMAConfig.preset("auto")))

picture = pipe("a red apple left of a cat on a yellow background", **asked.call).images[0]
picture.save(asked.output)
print(report(pipe))
