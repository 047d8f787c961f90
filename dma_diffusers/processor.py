"""`model.set_attn_processor(DMAAttnProcessor(...))`, the way in that Diffusers users know.

Importing this module teaches Diffusers' `AttentionMixin.set_attn_processor` to take a `DMAAttnProcessor`.
"""

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from diffusers.models.attention import AttentionMixin

from dma_diffusers import attach
from dma_diffusers.config import DMAConfig

# Methods of Diffusers that put other stock processors on a model, in which nobody asks for DMA to go.
_REPLACING = {
    "_load_ip_adapter_weights", "unload_ip_adapter", "fuse_qkv_projections", "unfuse_qkv_projections",
}  # fmt: skip


class DMAAttnProcessor:
    """Asks a model for DMA attention, by the method that Diffusers' users know.

    Each attention module keeps its stock processor, of which only the attention operation is intercepted. In a dict of
    processors, it is for the modules it is given to, which must agree on the configuration. Setting stock processors
    afterwards removes it, but where Diffusers itself sets others (to load or unload an IP-Adapter, to fuse or unfuse
    projections), these are wrapped too; and processors that were read before (`model.attn_processors`) can be set
    again.

    Args:
        config: what to apply (None: the default).
        **fields: fields of `DMAConfig` that are to be other than in `config`.

    Raises:
        ValueError: for a field that `DMAConfig` has not, or a value that it does not allow.

    Examples:
        >>> pipe.transformer.set_attn_processor(DMAAttnProcessor(window=384))
    """

    def __init__(self, config: DMAConfig | None = None, **fields: Any):
        self.config = DMAConfig.of(config, **fields)

    def __call__(self, *args, **kwargs):
        raise RuntimeError(
            "DMAAttnProcessor was set on a lone module, which does not tell where its text is: "
            "use model.set_attn_processor(...) or dma_diffusers.apply(model, ...)"
        )


def _taught(stock_method: Callable) -> Callable:
    """`AttentionMixin.set_attn_processor`, which takes a `DMAAttnProcessor` too, alone or in a dict."""

    @wraps(stock_method)
    def set_attn_processor(self: torch.nn.Module, processor: Any) -> None:
        if isinstance(processor, DMAAttnProcessor):
            return attach.apply(self, processor.config)
        given = processor if isinstance(processor, dict) else {"": processor}
        asked = {name: value.config for name, value in given.items() if isinstance(value, DMAAttnProcessor)}
        if asked:
            return _set_some(self, given, asked, stock_method)
        stock_method(self, processor)
        attach.settle(self, keeps=sys._getframe(1).f_code.co_name in _REPLACING)

    return set_attn_processor


def _set_some(model: Any, given: dict[str, Any], asked: dict[str, DMAConfig], stock_method: Callable) -> None:
    """Sets the processors `given`, and applies the configurations `asked` to the modules that are to have one."""
    if len(set(asked.values())) > 1:
        raise ValueError("the DMAAttnProcessors of one model must agree on their configuration")
    modules = {name.removesuffix(".processor") for name in asked}
    attach_them = attach.prepare(model, next(iter(asked.values())), modules)
    attach.restore(model)
    stock = model.attn_processors
    stock_method(model, {name: stock[name] if name in asked else value for name, value in given.items()})
    attach_them()


AttentionMixin.set_attn_processor = _taught(AttentionMixin.set_attn_processor)
