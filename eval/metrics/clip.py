"""CLIPScore tells how well a picture shows what its prompt says, CLIP-IQA how good it looks, by a CLIP of the user's.

torchmetrics 1.9 has both, too, but takes transformers 5's outputs for tensors.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch.nn import functional

from dma_diffusers.eval.metrics.float32 import exact_float32


class ClipScorer:
    """This scores pictures by a CLIP. CLIPScore is max(100 · cos(picture, prompt), 0), with w = 100.

    Its source is Hessel et al., https://arxiv.org/abs/2104.08718. A prompt that is longer than the model reads is cut.

    Args:
        model: a local folder or a hub id of a CLIP, with safetensors weights.
        device: where it runs.

    Attributes:
        truncated: the prompts that were cut.

    Raises:
        ValueError: the model is not a CLIP.
        OSError: it cannot be loaded; the message says what to do instead.
    """

    def __init__(self, model: str | Path, device: torch.device | str):
        from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, CLIPModel

        try:
            config = AutoConfig.from_pretrained(model)
            if config.model_type == "clip":
                self.model = CLIPModel.from_pretrained(model, use_safetensors=True).eval().to(device)
                self.tokenizer = AutoTokenizer.from_pretrained(model)
                self.prepare = AutoImageProcessor.from_pretrained(
                    model, backend="pil"
                )  # CLIP was trained with it
        except (OSError, ValueError, SafetensorError) as error:
            raise OSError(_what_to_do(model, error)) from error
        if config.model_type != "clip":
            raise ValueError(f"{model} is a {config.model_type} model; CLIPScore is defined for a clip model")
        self.length = min(config.text_config.max_position_embeddings, self.tokenizer.model_max_length)
        self.truncated: set[str] = set()

    def score(self, pictures: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Score uint8 `[B, 3, H, W]` pictures and their B prompts: `[B]` float32, 0 to 100."""
        prompts = list(prompts)
        whole = self.tokenizer(prompts, verbose=False)["input_ids"]
        self.truncated.update(p for p, ids in zip(prompts, whole, strict=True) if len(ids) > self.length)
        return (100 * (self.embed(pictures) * self._read(prompts)).sum(-1)).clamp(min=0)

    def quality(self, pictures: torch.Tensor) -> torch.Tensor:
        """Compute CLIP-IQA (Wang et al., https://arxiv.org/abs/2207.12396) of uint8 `[B, 3, H, W]` pictures.

        It is `[B]` float32, 0 to 1: how much likelier "Good photo." is than "Bad photo.", as torchmetrics computes it
        for a CLIP that is named. The paper's own takes the positions out of its CLIP and does not resize.
        """
        return (100 * self.embed(pictures) @ self._good_and_bad.T).softmax(-1)[:, 0]

    @cached_property
    def _good_and_bad(self) -> torch.Tensor:
        return self._read(["Good photo.", "Bad photo."])

    @exact_float32()
    @torch.inference_mode()
    def embed(self, pictures: torch.Tensor) -> torch.Tensor:
        """Return embeddings of uint8 `[B, 3, H, W]` pictures, of length 1: `[B, D]`."""
        prepared = self.prepare(list(pictures.cpu()), return_tensors="pt").to(self.model.device)
        seen = self.model.vision_model(pixel_values=prepared["pixel_values"]).pooler_output
        return functional.normalize(self.model.visual_projection(seen), dim=-1)

    @exact_float32()
    @torch.inference_mode()
    def _read(self, texts: list[str]) -> torch.Tensor:
        """Return embeddings of texts, of length 1: `[B, D]`; a text that is too long is cut."""
        tokens = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.length, return_tensors="pt"
        ).to(self.model.device)
        read = self.model.text_model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).pooler_output
        return functional.normalize(self.model.text_projection(read), dim=-1)


def _what_to_do(model: str | Path, error: Exception) -> str:
    reason = str(error).split("\n")[0].rstrip(".")
    if Path(model).is_dir():
        return (
            f"no CLIP in {model}: {reason}; it needs config.json, model.safetensors, the tokenizer's files and "
            "preprocessor_config.json"
        )
    return (
        f"no CLIP {model}: there is no such folder, and the hub did not give it ({reason}); where there is a "
        f"network: hf download {model} --local-dir FOLDER, then give the folder"
    )
