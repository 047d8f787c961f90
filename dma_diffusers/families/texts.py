"""The number of text tokens in joint attention, found from the arguments of a model's forward call.

Every finder takes the model and the call's arguments by name, and gives the number of tokens that stand as text in one
sequence with the image or the video: those that the model adds to a prompt count, such as registers. It gives None for
a call without text.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

Finder = Callable[[torch.nn.Module, Mapping[str, Any]], int | None]


def of_prompt(
    model: torch.nn.Module, call: Mapping[str, Any], name: str = "encoder_hidden_states"
) -> int | None:
    """Counts the tokens of the prompt `[B, S, …]`, the argument `name`."""
    prompt = call.get(name)
    return prompt.shape[1] if isinstance(prompt, torch.Tensor) else None


def with_registers(model: torch.nn.Module, call: Mapping[str, Any]) -> int | None:
    """Counts AuraFlow's registers, too: tokens that it learned, and puts before the prompt."""
    prompt, registers = of_prompt(model, call), getattr(model, "register_tokens", None)
    return None if prompt is None or registers is None else registers.shape[1] + prompt


def with_control_mode(model: torch.nn.Module, call: Mapping[str, Any]) -> int | None:
    """Counts the kind of control as a token, which FLUX's ControlNets for several kinds put before the prompt."""
    prompt = of_prompt(model, call)
    nets = getattr(model, "nets", [model])
    return None if prompt is None else prompt + any(getattr(net, "union", False) for net in nets)


def of_hidream(model: torch.nn.Module, call: Mapping[str, Any]) -> int | None:
    """Counts T5's tokens and twice Llama's: each block gets one of Llama's layers beside its last one."""
    t5, llama = call.get("encoder_hidden_states_t5"), call.get("encoder_hidden_states_llama3")
    if not isinstance(t5, torch.Tensor) or llama is None:
        return None
    return t5.shape[1] + 2 * llama[0].shape[-2]  # of [layers, B, S, C]


def of_cosmos3(model: torch.nn.Module, call: Mapping[str, Any]) -> int | None:
    """Reads the number of tokens that stand before those to be generated."""
    return call.get("und_len")


def of_qwen21(model: torch.nn.Module, call: Mapping[str, Any]) -> int | None:
    """Counts all tokens before the picture to be drawn: the prompt's, and those of pictures among them.

    A picture has four tokens for each that holds its place in the prompt.
    """
    prompt, images, shapes = of_prompt(model, call), call.get("hidden_states"), call.get("img_shapes")
    if prompt is None or images is None or not shapes:
        return None
    conditions = images.shape[1] - math.prod(shapes[0][-1])
    return prompt - conditions // 4 + conditions


def of_prior(model: torch.nn.Module, call: Mapping[str, Any]) -> int | None:
    """Counts the tokens of the prompt, if it has any, of its pooled embedding, and of the timestep behind them."""
    embedding = call.get("proj_embedding")
    if embedding is None:
        return None
    return (of_prompt(model, call) or 0) + (1 if embedding.ndim == 2 else embedding.shape[1]) + 1
