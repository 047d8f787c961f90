"""The norm and the RoPE of q and k inside of the operator, which reads and writes them anyway; of FLUX and Qwen-Image.

The stock processor runs as ever, on a module whose norms leave q and k as they are, and without angles. The operator
then takes both over; where a call falls back, they are applied in front of stock attention.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dma_diffusers.interception import Interception
from dma_diffusers.internals import (
    DiffusersRMSNorm,
    FluxAttnProcessor,
    QwenDoubleStreamAttnProcessor2_0,
    apply_rotary_emb,
    apply_rotary_emb_qwen,
)
from dma_diffusers.kernels.call import Norms, Rope

_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Kind:
    """How the stock processors of one class norm and turn q and k, channels 2i and 2i+1 by one angle.

    norm: the class of their norms. rounds_twice: of these, as in `Norms`. turn: the function that they call by its name
    to turn q or k. are_tables: tells whether the tables of a call of this `Interception`, with heads of so many
    channels, are as they should be. rope: gives these tables as the operator takes them. turned: turns q or k
    `[B, S, H, D]` by them, of which so many tokens are text, as the stock processor does.
    """

    norm: type[nn.Module]
    rounds_twice: bool
    turn: Callable
    are_tables: Callable[[Interception, Any, int], bool]
    rope: Callable[[Any], Rope]
    turned: Callable[[torch.Tensor, Any, int], torch.Tensor]


@dataclass(frozen=True)
class Change:
    """Norm and RoPE of q and k, which the stock processor of a module was kept from applying in one call.

    kind: of the processor. attention: the module. tables: those of the angles, as Diffusers has them.
    text: the number of tokens that come first and have norms of their own; 0 for none.
    """

    kind: Kind
    attention: Any
    tables: Any
    text: int

    @property
    def norms(self) -> Norms:
        """The norms as the operator takes them."""
        own = self.attention
        # Tokens that are all alike have the weights of the others, so that one kernel is compiled for all modules.
        q_first, k_first = (own.norm_added_q, own.norm_added_k) if self.text else (own.norm_q, own.norm_k)
        return Norms(
            own.norm_q.weight, own.norm_k.weight, own.norm_q.eps,
            self.text, q_first.weight, k_first.weight, self.kind.rounds_twice,
        )  # fmt: skip

    @property
    def rope(self) -> Rope:
        """The angles as the operator takes them: each once, and close together, as its kernels read them."""
        return self.kind.rope(self.tables)

    def applied(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """q and k `[B, H, S, D]` as the stock processor would have handed them to its attention."""
        own = self.attention
        first = (own.norm_added_q, own.norm_added_k) if self.text else (None, None)
        return self._applied(q, own.norm_q, first[0]), self._applied(k, own.norm_k, first[1])

    def _applied(self, x: torch.Tensor, norm: nn.Module, first_norm: nn.Module | None) -> torch.Tensor:
        x, text = x.transpose(1, 2), self.text
        x = norm(x) if first_norm is None else torch.cat((first_norm(x[:, :text]), norm(x[:, text:])), dim=1)
        return self.kind.turned(x, self.tables, text).transpose(1, 2)


class _WithoutNorms:
    """An attention module whose norms leave q and k as they are."""

    def __init__(self, attention: Any):
        self.attention = attention

    def __getattr__(self, name: str) -> Any:
        return _as_it_is if name in _NORMS else getattr(self.attention, name)


def without_change(
    kind: Kind, interception: Interception, stock_call: Any, *arguments: Any
) -> tuple[Change | None, tuple]:
    """Gives the change that the operator is to apply in a call of such a processor, and the arguments without it.

    arguments: all of the processor's: the module, hidden states, those of the text, masks, tables.
    None, and the arguments as they are, where something of the call is unusual.
    """
    attention, hidden, encoder, *masks, tables = arguments
    text = 0 if encoder is None else encoder.shape[1]
    if (
        interception.stand_in is not None
        or masks[-1] is not None  # not that of the text, which Qwen-Image has before it
        or torch.is_grad_enabled()
        or interception.forward.call.trains  # under a checkpoint, which first runs without gradients
        or torch.is_autocast_enabled(hidden.device.type)
        or stock_call.__globals__[kind.turn.__name__] is not kind.turn
        or (encoder is None) != (attention.added_kv_proj_dim is None)
        or not kind.are_tables(interception, tables, attention.inner_dim // attention.heads)
        or any(x.device != hidden.device for x in tables)
    ):
        return None, arguments
    if not _are_plain(kind, attention, text, hidden):
        return None, arguments
    return Change(kind, attention, tables, text), (_WithoutNorms(attention), hidden, encoder, *masks, None)


def usually_changes(processor: Any, attention: Any, like: torch.Tensor) -> Kind | None:
    """Says how the operator changes q and k in usual calls of a module with hidden states `like` these, if at all."""
    kind = KINDS.get(type(processor))
    text = kind is not None and attention.added_kv_proj_dim is not None
    return kind if kind is not None and _are_plain(kind, attention, text, like) else None


def _are_plain(kind: Kind, attention: Any, text: int, hidden: torch.Tensor) -> bool:
    """Tells whether the norms of a module, and of its text if it has any, are all alike and as stock has them."""
    norms = [getattr(attention, name) for name in (_NORMS if text else _NORMS[:2])]
    return (
        all(_is_plain(norm, kind.norm, hidden) for norm in norms) and len({norm.eps for norm in norms}) == 1
    )


def _is_plain(norm: Any, cls: Any, hidden: torch.Tensor) -> bool:
    """Tells whether `norm` is of this class, that nothing hooks, with weights like the hidden states."""
    return (
        type(norm) is cls
        and norm.eps is not None
        and norm.weight is not None
        and norm.weight.dtype == hidden.dtype
        and norm.weight.dtype in _DTYPES
        and norm.weight.device == hidden.device
        and getattr(norm, "bias", None) is None
        and not norm._forward_hooks
        and not norm._forward_pre_hooks
        and "forward" not in norm.__dict__  # as hooks of Diffusers have it
    )


def _as_it_is(x: torch.Tensor) -> torch.Tensor:
    return x


def _are_cosines_and_sines(interception: Interception, tables: Any, head_dim: int) -> bool:
    """Tells whether these are float32 `[S, D]` each, every angle twice."""
    return interception.forward.call.pairs_angles and _are_two(tables, head_dim, torch.float32)


def _are_complex(interception: Interception, tables: Any, head_dim: int) -> bool:
    """Tells whether these are the image's and the text's numbers, complex64 `[S, D/2]` each."""
    return _are_two(tables, head_dim // 2, torch.complex64)


def _are_two(tables: Any, width: int, dtype: torch.dtype) -> bool:
    return (
        isinstance(tables, tuple)
        and len(tables) == 2
        and all(x.ndim == 2 and x.shape[1] == width and x.dtype is dtype for x in tables)
    )


def _each_once(tables: tuple[torch.Tensor, torch.Tensor]) -> Rope:
    cos, sin = tables
    return cos[:, ::2].contiguous(), sin[:, ::2].contiguous()


def _parts_of_complex(tables: tuple[torch.Tensor, torch.Tensor]) -> Rope:
    image, text = map(torch.view_as_real, tables)
    cos, sin = torch.cat((text, image)).unbind(-1)
    return cos.contiguous(), sin.contiguous()


def _turned_together(x: torch.Tensor, tables: Any, text: int) -> torch.Tensor:
    return apply_rotary_emb(x, tables, sequence_dim=1)


def _turned_apart(x: torch.Tensor, tables: Any, text: int) -> torch.Tensor:
    of_image, of_text = tables
    return torch.cat(
        (
            apply_rotary_emb_qwen(x[:, :text], of_text, use_real=False),
            apply_rotary_emb_qwen(x[:, text:], of_image, use_real=False),
        ),
        dim=1,
    )


KINDS: dict[type, Kind] = {
    FluxAttnProcessor: Kind(
        nn.RMSNorm, False, apply_rotary_emb, _are_cosines_and_sines, _each_once, _turned_together
    ),
    QwenDoubleStreamAttnProcessor2_0: Kind(
        DiffusersRMSNorm, True, apply_rotary_emb_qwen, _are_complex, _parts_of_complex, _turned_apart
    ),
}
"""Processors of these very classes; of no other is it known."""
