"""Draw a clip with HunyuanVideo and a schedule: full attention while noise is high, then the most important tiles."""

from arguments import parse
from diffusers import DiffusionPipeline
from diffusers.utils import export_to_gif

from dma_diffusers import apply, report

asked = parse(
    "hunyuanvideo-community/HunyuanVideo",
    "hunyuan.gif",
    width=1280,
    height=720,
    num_frames=129,
    num_inference_steps=50,
)
pipe = DiffusionPipeline.from_pretrained(asked.model, dtype=asked.dtype).to(asked.device)
pipe.vae.enable_tiling()
apply(
    pipe,
    schedule="sigma>0.9: dense(); importance(budget=0.1, low=0.3, beyond=mean)",
    high="bf16",
    low="int8",
)

clip = pipe("a red car moving left on a grey background", output_type="pil", **asked.call).frames[0]
export_to_gif(clip, asked.output, fps=15)
print(report(pipe))
