"""A call of a tiny model whose text and grid are known."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from dma_diffusers.components import unwrapped
from tests import tiny_pipelines

TEXT = 21  # tokens
AXES = tiny_pipelines.rope_axes(16)


@dataclass
class Case:
    """One call of a model.

    text: of joint calls. grid: the image's or the video's, () where there is none, or where not all tokens lie on it.
    latents: as the VAE has them. inputs: the model's other arguments. joint_calls, image_calls: of attention; the
    latter have the image or the video alone. other_calls: (queries, keys, start and stop of the text) of further ones
    that are intercepted, and how many they are. pack: the pipeline's, to `hidden_states`. prompt: those text tokens
    that follow the prompt, if not all do, or not they alone. prompt_tokens: that the model is given, of `prompt_width`
    numbers, or as `draw` has them. names: of its arguments for latents, prompt and timestep, None for one that it has
    not. axes: of the latents, on which the grid's sides lie. length: tokens that stand beside the text, if not the
    grid's. image_queries: the queries of joint calls are the image's alone.
    """

    model: torch.nn.Module
    text: tuple[int, int]
    grid: tuple[int, ...]
    latents: Any
    inputs: dict
    joint_calls: int
    image_calls: int = 0
    other_calls: Counter = field(default_factory=Counter)
    pack: Callable[[torch.Tensor], Any] = lambda latents: latents
    prompt: tuple[int, int] | None = None
    prompt_tokens: int = TEXT
    prompt_width: int | None = None
    draw: Callable[[], Any] | None = None
    names: tuple[str | None, ...] = ("hidden_states", "encoder_hidden_states", "timestep")
    axes: tuple[int, ...] = ()
    length: int | None = None
    image_queries: bool = False

    @property
    def tokens(self) -> int:
        return torch.Size(self.grid).numel() if self.length is None else self.length

    @property
    def calls(self) -> Counter:
        """(queries, keys, start and stop of the text) of the calls that are intercepted, and how many they are."""
        start, stop = self.text
        keys = self.tokens + stop - start
        joint = (self.tokens if self.image_queries else keys, keys, start, stop)
        image = (self.tokens, self.tokens, 0, 0)
        return self.other_calls + Counter({joint: self.joint_calls}) + Counter({image: self.image_calls})

    def texts(self, number: int) -> list[Any]:
        """Different texts for the model."""
        return [self.draw() if self.draw else self._prompt() for _ in range(number)]

    def call(self, text: Any, latents: torch.Tensor | None = None) -> dict:
        """The model's arguments."""
        latents = self.latents if latents is None else latents
        timestep = torch.full((latents.shape[0],), 0.5)
        named = dict(zip(self.names, (self.pack(latents), text, timestep), strict=True)) | self.inputs
        return {name: value for name, value in named.items() if name}

    def run(self, text: Any, latents: torch.Tensor | None = None) -> torch.Tensor:
        call = self.call(text, latents)
        if "return_dict" in signature(type(unwrapped(self.model)).forward).parameters:
            call["return_dict"] = False
        out = self.model(**call)[0]
        return torch.stack(out) if isinstance(out, list) else out

    def keys(self, text: Any, latents: torch.Tensor | None = None) -> torch.Tensor:
        """The keys `[B, H, S, D]` of the first attention call that has all of the image or the video, and its text."""
        with Keys(self.tokens + self.text[1] - self.text[0]) as mode:
            self.run(text, latents)
        return mode.seen[0]

    def _prompt(self) -> torch.Tensor:
        names = ("joint_attention_dim", "text_dim", "text_embed_dim", "caption_channels", "cap_feat_dim")
        width = self.prompt_width or next(
            self.model.config[name] for name in names if self.model.config.get(name)
        )
        return torch.randn(self.latents.shape[0], self.prompt_tokens, width)


class Keys(TorchFunctionMode):
    """Records the keys of every attention call over so many of them."""

    def __init__(self, tokens: int):
        super().__init__()
        self.tokens = tokens
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            key = [*args, *(kwargs or {}).values()][1]
            if key.shape[2] >= self.tokens:
                self.seen.append(key)
        return func(*args, **(kwargs or {}))


def without_zeros(model: torch.nn.Module) -> torch.nn.Module:
    """Draws the parameters that are zero before training, and would hide what attention does."""
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def pack_squares(latents: torch.Tensor) -> torch.Tensor:
    """Two by two, as FLUX's pipeline does."""
    return diffusers.FluxPipeline._pack_latents(latents, *latents.shape)
