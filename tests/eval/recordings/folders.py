"""Folders of recordings made of random numbers."""

from pathlib import Path

import torch

from dma_diffusers.eval.recordings.store import Recording, Recordings, Tensors, serialise


def saved(
    folder: Path, calls: list[tuple[dict, Tensors]], modules: tuple[str, ...], kind: str = "Model"
) -> Recordings:
    """A folder with these calls: fields of `Recording` that differ from the first step's, and the tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "model": {"class": kind, "modules": list(modules), "fingerprint": ""}, "pipeline": "Pipeline",
        "prompts": ["a", "b"], "seeds": [0, 1], "call": {}, "steps": [0, 1], "versions": {}, "hardware": "",
    }  # fmt: skip
    recordings = Recordings(folder, settings)
    for number, (fields, tensors) in enumerate(calls):
        data = serialise(tensors, (), ())
        file = f"{number}.safetensors"
        (folder / file).write_bytes(data)
        of_call = {
            "prompt": 0, "step": 0, "call": 0, "module": modules[0], "sigma": 1.0, "text": (0, 0), "scale": None,
            "is_causal": False,
        }  # fmt: skip
        shape = tuple(tensors.q.shape)
        recordings.recordings.append(Recording(**of_call | fields, shape=shape, file=file, bytes=len(data)))
    recordings.save()
    return recordings


def random_tensors(
    seed: int,
    tokens: int,
    heads: int = 2,
    kv_heads: int = 2,
    batch: int = 1,
    masked: bool = False,
    head_dim: int = 32,
) -> Tensors:
    """q, k and v whose attention is uneven: near tokens attend to each other."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.arange(tokens)[:, None] / tokens * 3
    near = torch.cat([place.sin(), place.cos()], -1) * 6

    def random(count: int) -> torch.Tensor:
        x = torch.randn(batch, count, tokens, head_dim, generator=generator)
        x[..., :2] += near * (1 + torch.arange(count)[:, None, None])
        return x

    mask = torch.rand(batch, tokens, generator=generator) > 0.3 if masked else None
    return Tensors(
        random(heads),
        random(kv_heads),
        torch.randn(batch, kv_heads, tokens, head_dim, generator=generator),
        mask,
    )
