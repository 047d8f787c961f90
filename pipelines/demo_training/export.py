"""Write trained weights into a folder that ``FluxPipeline.from_pretrained`` loads.

python -m dma_diffusers.pipelines.demo_training.export .demo/high/model.safetensors .demo/vae flux
"""

import argparse
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxPipeline
from safetensors.torch import load_model

from dma_diffusers.pipelines.demo_training.model import FULL_RESOLUTION, DemoModel
from dma_diffusers.pipelines.demo_training.text import POOLED_TOKENS, TEXT_TOKENS, build_tokenizer

GENERATION = {
    "height": FULL_RESOLUTION,
    "width": FULL_RESOLUTION,
    "num_inference_steps": 24,
    "max_sequence_length": TEXT_TOKENS,
    "guidance_scale": 1.0,  # this is FLUX's embedded guidance, which this model does not have
    "true_cfg_scale": 3.0,
    "negative_prompt": "",
}
"""The keyword arguments of the pipeline call for which the model was trained."""

_TOKENIZER_CLASS = ["transformers", "PreTrainedTokenizerFast"]  # its name in both transformers 4 and 5


def build_pipeline(weights: Path, vae: Path) -> FluxPipeline:
    """Build the bf16 pipeline from the ``weights`` that train.py saved and the autoencoder's folder."""
    model = DemoModel()
    load_model(model, weights)
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=False),
        vae=AutoencoderKL.from_pretrained(vae),
        text_encoder=model.text.clip,
        tokenizer=build_tokenizer(POOLED_TOKENS),
        text_encoder_2=model.text.t5,
        tokenizer_2=build_tokenizer(TEXT_TOKENS),
        transformer=model.transformer,
    )
    for module in (pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        module.to(torch.bfloat16)
    return pipeline


def save_pipeline(
    pipeline: DiffusionPipeline, folder: Path, generation: Mapping[str, Any] = GENERATION
) -> None:
    """Save ``pipeline`` so that stock classes load it, together with the keyword arguments of its call."""
    pipeline.save_pretrained(folder, max_shard_size="14MB")
    for name in pipeline.components:
        if name.startswith("tokenizer"):
            _edit(folder / "model_index.json", {name: _TOKENIZER_CLASS})
            _edit(folder / name / "tokenizer_config.json", {"tokenizer_class": _TOKENIZER_CLASS[1]})
        if name.startswith("text_encoder"):
            # If no dtype is asked for, Transformers uses this one and Diffusers uses float32: they must agree.
            _edit(folder / name / "config.json", {"dtype": "float32"})
    for config in folder.glob("*/config.json"):
        _edit(config, {}, {"_name_or_path"})  # this is the path from which a component was loaded
    _edit(folder / "generation.json", generation)


def _edit(path: Path, changes: Mapping[str, Any], dropped: Collection[str] = ()) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    kept = {name: value for name, value in content.items() if name not in dropped}
    path.write_text(json.dumps({**kept, **changes}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("weights", type=Path, help="model.safetensors of train.py")
    parser.add_argument("vae", type=Path, help="folder of the autoencoder")
    parser.add_argument("output", type=Path, help="folder of the pipeline")
    args = parser.parse_args()
    save_pipeline(build_pipeline(args.weights, args.vae), args.output)


if __name__ == "__main__":
    main()
