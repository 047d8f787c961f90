"""A tiny random CLIP with all its files, as a user would name one."""

import json
from pathlib import Path

import torch
from tokenizers.processors import TemplateProcessing
from transformers import CLIPConfig, CLIPModel

from tests import tiny_pipelines

SIDE, LENGTH, END = 32, 24, 3
MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]


def tokenizer():
    """Bytes between <s> and <unk>: for the sake of old checkpoints CLIP does not look for an end token of id 2."""
    made = tiny_pipelines.tokenizer(LENGTH)
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A <unk>", special_tokens=[("<s>", 1), ("<unk>", END)]
    )
    return made


def save_clip(folder: Path) -> Path:
    """The folder, with the model in it."""
    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4)
    vocabulary = dict(vocab_size=tiny_pipelines.VOCABULARY, bos_token_id=1, eos_token_id=END)
    text = shape | vocabulary | dict(max_position_embeddings=LENGTH)
    vision = shape | dict(image_size=SIDE, patch_size=8)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    preparation = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": SIDE},
        "crop_size": {"height": SIDE, "width": SIDE},
        "image_mean": MEAN,
        "image_std": STD,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preparation))
    return folder
