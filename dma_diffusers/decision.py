"""The decision about one attention operation: the operator runs it, or it falls back to stock attention, and why."""

import math

import torch
from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode
from torch.overrides import _get_current_function_mode_stack

from dma_diffusers.config import DMAConfig
from dma_diffusers.families import Family
from dma_diffusers.kernels import operator

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TOO_SHORT = "fewer than "
OTHER_MASK = "a mask that is not boolean over keys alone"
WANTS_GRADIENTS = "gradients are wanted, and there is no backward yet"
OTHER_TOKENS = "cross-attention: queries and keys are different tokens"
UNKNOWN_TEXT = "cross-attention, or a model's call that does not tell where text is"


class Decision:
    """Decides for one attention module, by its configuration and the family of its model."""

    def __init__(self, config: DMAConfig, family: Family):
        self.config = config
        self.family = family
        self._limits: dict[tuple, tuple[str, int]] = {}

    def limits(self, device: torch.device, head_dim: int, masked: str = "") -> tuple[str, int]:
        """`DMAConfig.why_stock` and `DMAConfig.least_keys`, of which the answers of a device are kept in eager mode.

        masked: as in `DMAConfig.why_stock`.
        """
        config = self.config
        if config.lowering != "fastest" or torch.compiler.is_compiling():
            return config.why_stock(device, head_dim, masked), config.least_keys(device, head_dim)
        key = device, head_dim, masked
        if key not in self._limits:  # to look at the device takes longer than all other checks of a call
            self._limits[key] = config.why_stock(*key), config.least_keys(device, head_dim)
        return self._limits[key]

    def why_stock(self, query, key, value, attn_mask, dropout_p, scale, enable_gqa, text, parts=1) -> str:
        """The reason for which a `scaled_dot_product_attention` falls back to stock; empty if the operator takes it.

        text: start and stop of the text tokens; None if the call does not tell. parts: the number of GPUs that have as
        many keys each.
        """
        if (
            query.ndim != 4 or key.ndim != 4 or value.ndim != 4
            or query.dtype not in DTYPES or key.dtype not in DTYPES or value.dtype not in DTYPES
            or value.shape[-1] != query.shape[-1]
        ):  # fmt: skip
            return "q, k and v are not [batch, heads, tokens, head_dim] in bf16, fp16 or fp32"
        if 0 in query.shape or 0 in key.shape:
            return "an empty call"
        if query.shape[0] != key.shape[0] or key.shape != value.shape:
            return "q, k and v of different batches, or k and v of different heads"
        if query.shape[-2] != key.shape[-2]:
            return OTHER_TOKENS
        if text is None:
            return UNKNOWN_TEXT
        masked = "" if attn_mask is None else self.family.masked(self.config.protected(text))
        reason, least = self.limits(query.device, query.shape[-1], masked)
        if reason:
            return reason
        if key.shape[-2] * parts < least:
            return f"{TOO_SHORT}{least} keys"
        if query.shape[1] != key.shape[1] and not enable_gqa:
            return "fewer heads of keys than of queries, without enable_gqa"
        if attn_mask is not None and not _masks_keys(attn_mask, key):
            return OTHER_MASK
        if scale is not None and not 0 < scale < math.inf:
            return "a scale that is not a positive number"
        if _shares_memory(query) or _shares_memory(key) or _shares_memory(value):
            return "elements of q, k or v share memory, as after expand"
        if dropout_p > 0:
            return "dropout"
        if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
            return WANTS_GRADIENTS
        if not torch.compiler.is_compiling() and any(
            isinstance(mode, AttentionScoreSkipFunctionMode) for mode in _get_current_function_mode_stack()
        ):
            return "a guider skips attention scores"
        return ""

    def lasts(self, reason: str, has_encoder: bool, wants_gradients: bool) -> bool:
        """Tells whether further calls of a module, with arguments of the same shapes, fall back for this reason too.

        has_encoder: the module was given `encoder_hidden_states`. wants_gradients: of its `hidden_states`.
        """
        if reason in (
            OTHER_TOKENS,
            UNKNOWN_TEXT,
        ):  # of others, the next call may have its keys from elsewhere
            return has_encoder and self.family.text == "none"
        if reason == WANTS_GRADIENTS:
            return wants_gradients
        return reason == OTHER_MASK or reason.startswith(TOO_SHORT)


def _shares_memory(x: torch.Tensor) -> bool:
    """Tells whether elements of x share memory; in a compiled graph, whether x was expanded."""
    if torch.compiler.is_compiling():  # to order strides would tie the graph to their order
        return any(stride == 0 and size != 1 for stride, size in zip(x.stride(), x.shape, strict=True))
    return torch._debug_has_internal_overlap(x) != 0 and operator.aliases(x)  # 0: surely none


def _masks_keys(mask: torch.Tensor, key: torch.Tensor) -> bool:
    """Tells whether `mask` is boolean and the same for every head and query."""
    if mask.dtype != torch.bool or not 2 <= mask.ndim <= 4 or mask.shape[-1] != key.shape[-2]:
        return False
    return all(size == 1 for size in mask.shape[-3:-1]) and (
        mask.ndim < 4 or mask.shape[0] in (1, key.shape[0])
    )
