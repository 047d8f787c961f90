"""Draw with Qwen-Image, with attention and linear layers in 8 bits: its linear layers take most of a step."""

from arguments import parse
from diffusers import DiffusionPipeline

from dma_diffusers import DMAConfig, apply, quantize_linears, report

asked = parse("Qwen/Qwen-Image", "qwen.png", width=1328, height=1328, num_inference_steps=50)
pipe = DiffusionPipeline.from_pretrained(asked.model, dtype=asked.dtype).to(asked.device)
quantize_linears(
    pipe, "fp8"
)  # layers that are published as sensitive stay as they are; the receipt names them
apply(pipe, DMAConfig.preset("auto"))

picture = pipe("a big penguin between a red zebra and a small peach", **asked.call).images[0]
picture.save(asked.output)
print(report(pipe))
