"""Write trained weights into a folder that ``WanPipeline.from_pretrained`` loads.

python -m dma_diffusers.pipelines.demo_video_training.export .demo/video/model.safetensors .demo/video_vae wan
"""

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline
from safetensors.torch import load_model

from dma_diffusers.pipelines.demo_training.export import save_pipeline
from dma_diffusers.pipelines.demo_video_training.clips import HEIGHT, WIDTH
from dma_diffusers.pipelines.demo_video_training.model import VideoModel
from dma_diffusers.pipelines.demo_video_training.motions import FRAMES
from dma_diffusers.pipelines.demo_video_training.text import TEXT_TOKENS, video_tokenizer

GENERATION = {
    "height": HEIGHT,
    "width": WIDTH,
    "num_frames": FRAMES,
    "num_inference_steps": 24,
    "max_sequence_length": TEXT_TOKENS,
    "guidance_scale": 4.0,
    "negative_prompt": "",
}
"""The keyword arguments of the pipeline call for which the model was trained."""


def build_pipeline(weights: Path, vae: Path) -> WanPipeline:
    """Build the bf16 pipeline from the ``weights`` that train.py saved and the autoencoder's folder."""
    model = VideoModel()
    load_model(model, weights)
    pipeline = WanPipeline(
        tokenizer=video_tokenizer(),
        text_encoder=model.text,
        vae=AutoencoderKLWan.from_pretrained(vae),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=model.transformer,
    )
    for module in (pipeline.transformer, pipeline.vae, pipeline.text_encoder):
        module.to(torch.bfloat16)
    return pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("weights", type=Path, help="model.safetensors of train.py")
    parser.add_argument("vae", type=Path, help="folder of the autoencoder")
    parser.add_argument("output", type=Path, help="folder of the pipeline")
    args = parser.parse_args()
    save_pipeline(build_pipeline(args.weights, args.vae), args.output, GENERATION)


if __name__ == "__main__":
    main()
