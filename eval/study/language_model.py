"""The attention of a language model is recorded as that of a pipeline is, to check what holds for diffusion alone."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dma_diffusers.eval.recordings.store import Recording, Recordings

_NAME = "recorded"


def record(
    file: Path,
    texts: Sequence[str],
    folder: Path,
    tokens: int,
    every: int = 1,
    on_step: Callable[[str, int, int], None] = lambda title, done, total: None,
) -> Recordings:
    """Record q, k, v of every so-many-th layer, for the first `tokens` tokens of each text, in `folder`.

    file: weights and tokeniser as GGUF, of a causal model that transformers can load (which needs the package gguf).
    Raises ValueError for a text that is shorter.
    """
    from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    source: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()
    layers = [f"layers.{number}" for number in range(0, model.config.num_hidden_layers, every)]
    settings = {"model": {"class": type(model).__name__, "modules": layers}, "prompts": list(texts)}
    recordings = Recordings(folder, settings)
    folder.mkdir(parents=True, exist_ok=True)
    prompt = 0

    def attend(module, q, k, v, mask, **options):
        if (name := f"layers.{module.layer_idx}") in layers:
            path = folder / f"{prompt:04d}-{name}.safetensors"
            save_file({"q": q.contiguous(), "k": k.contiguous(), "v": v.contiguous()}, path)
            scale = options.get("scaling")
            of_file = {"text": (0, 0), "scale": scale, "is_causal": True, "file": path.name}
            size = path.stat().st_size
            recordings.recordings.append(
                Recording(prompt, 0, 0, name, None, tuple(q.shape), **of_file, bytes=size)
            )
        return sdpa_attention_forward(module, q, k, v, None, **options | {"is_causal": True})

    AttentionInterface.register(_NAME, attend)
    model.set_attn_implementation(_NAME)
    for prompt, text in enumerate(texts):
        ids = tokenizer(text, return_tensors="pt").input_ids[:, :tokens]
        if ids.shape[1] < tokens:
            raise ValueError(f"text {prompt} has {ids.shape[1]} tokens: {tokens} are asked for")
        with torch.no_grad():
            model(ids, use_cache=False)
        on_step("recording the language model", prompt + 1, len(texts))
    return recordings
