"""Fine-tune FLUX.1-dev for MXFP4 linear layers: adapters learn from its own full-precision drawings."""

from pathlib import Path

from arguments import parse
from diffusers import DiffusionPipeline

from dma_diffusers import DMAConfig, report
from dma_diffusers.finetune import prepare
from dma_diffusers.pipelines.finetuning.finetune import Watch, finetune
from dma_diffusers.pipelines.finetuning.request import Request
from dma_diffusers.pipelines.finetuning.trainer import Settings
from dma_diffusers.progress import progress

asked = parse(
    "black-forest-labs/FLUX.1-dev",
    "finetune.png",
    width=1024,
    height=1024,
    num_inference_steps=28,
    train_steps=400,
)
steps, generator = asked.call.pop("train_steps"), asked.call.pop("generator")
precision = {
    "linears": "qat",
    "attention": DMAConfig(high="bf16", low="int8", policy="dense(everywhere=low)"),
}
prompts = ["a red apple left of a cat on a yellow background", "a big penguin between a zebra and a peach"]
settings = Settings(batch=1, learning_rate=1e-4)
folder = Path(asked.output).with_suffix("")
with progress() as on_step:
    request = Request(asked.model, asked.call, prompts, **precision, lora_rank=16, settings=settings)
    finetune(request, steps, folder, Watch(checkpoint_every=100), on_step)

pipe = DiffusionPipeline.from_pretrained(asked.model, dtype=asked.dtype).to(asked.device)
pipe.load_lora_weights(folder / "lora")
prepare(pipe.transformer, **precision)
picture = pipe(prompts[0], generator=generator, **asked.call).images[0]
picture.save(asked.output)
print(report(pipe))
