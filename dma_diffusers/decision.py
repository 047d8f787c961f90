"""The decision about one attention operation: the operator runs it, or it falls back to stock attention, and why."""

import math

import torch
from torch.fx.experimental.symbolic_shapes import guard_or_false

from dma_diffusers.config import DMAConfig
from dma_diffusers.families import Family
from dma_diffusers.internals import (
    HARMLESS_MODES,
    AttentionScoreSkipFunctionMode,
    function_modes,
    may_overlap,
)
from dma_diffusers.kernels.checks import aliases

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TOO_SHORT = "fewer than "
OTHER_MASK = "a mask that is not boolean over keys alone"
NOT_RUNNING = (
    "the module was called outside a call of its model, whose hooks tell where text is: call the model itself, not its "
    "forward, and apply DMA again where it was removed"
)
WANTS_GRADIENTS = "gradients are wanted, and no backward is known to be faster than stock's"
RUNS_ANEW = (
    "a gradient checkpoint that is not the model's own runs attention anew, outside of the model's call, whose hooks "
    "tell where text is: call the model's enable_gradient_checkpointing() instead"
)
GRADIENTS_OF_SEVERAL_GPUS = "gradients are wanted over several GPUs"
OTHER_TOKENS = "cross-attention: queries and keys are different tokens"
UNKNOWN_TEXT = "cross-attention, or a model's call that does not tell where text is"


class Decision:
    """Decides for one attention module in one entry of its schedule, by its configuration and its model's family.

    needs_grid: the words of a policy that any entry has, and that needs to know what tokens lie on; empty for none.
    no_backward: why one of the entry's policies has no backward, in words; empty if all have one.
    """

    def __init__(self, config: DMAConfig, family: Family, needs_grid: str, no_backward: str = ""):
        self.config = config
        self.family = family
        self.needs_grid = needs_grid
        self.no_backward = no_backward
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
        Raises ValueError for a policy on the grid where the queries are the image's alone, and as `why_no_gradients`.
        """
        if (
            query.ndim != 4 or key.ndim != 4 or value.ndim != 4
            or query.dtype not in DTYPES or key.dtype not in DTYPES or value.dtype not in DTYPES
            or value.shape[-1] != query.shape[-1]
        ):  # fmt: skip
            return "q, k and v are not [batch, heads, tokens, head_dim] in bf16, fp16 or fp32"
        if 0 in query.shape or 0 in key.shape:
            return "an empty call"
        if query.shape[0] != key.shape[0] or any(map(_differ, key.shape, value.shape)):
            return "q, k and v of different batches, or k and v of different heads"
        if text is None:
            return OTHER_TOKENS if _differ(query.shape[-2], key.shape[-2]) else UNKNOWN_TEXT
        if self.needs_grid and _differ(query.shape[-2], key.shape[-2]):
            raise ValueError(
                f"{self.needs_grid} needs the text among the queries, which in this model are the image's alone: "
                "use a policy that needs no grid, such as diagonal(window=128) or importance(budget=0.05)"
            )
        masked = "" if attn_mask is None else self.family.masked(self.config.protected(text))
        reason, least = self.limits(query.device, query.shape[-1], masked)
        if reason:
            return reason
        # A length that a graph does not know is long enough.
        if guard_or_false(key.shape[-2] * parts < least):
            return f"{TOO_SHORT}{least} keys"
        if query.shape[1] != key.shape[1] and not enable_gqa:
            return "fewer heads of keys than of queries, without enable_gqa"
        if attn_mask is not None and (other := _why_other_mask(attn_mask, key)):
            return other
        if scale is not None and not 0 < scale < math.inf:
            return "a scale that is not a positive number"
        if _shares_memory(query) or _shares_memory(key) or _shares_memory(value):
            return "elements of q, k or v share memory, as after expand"
        if dropout_p > 0:
            return "dropout"
        wants_gradients = torch.is_grad_enabled() and (
            query.requires_grad or key.requires_grad or value.requires_grad
        )
        return _why_another_attends() or (self.why_no_gradients() if wants_gradients else "")

    def why_no_gradients(self) -> str:
        """The reason for which calls whose gradients are wanted fall back; empty if the operator takes them.

        Raises ValueError where a lowering was asked for that takes every call, and a policy has no backward.
        """
        if self.config.lowering == "fastest":
            return WANTS_GRADIENTS
        if self.no_backward:
            raise ValueError(f"gradients are wanted: {self.no_backward}")
        return ""

    def lasts(self, reason: str, has_encoder: bool, wants_gradients: bool) -> bool:
        """Tells whether further calls of a module, with arguments of the same shapes, fall back for this reason too.

        has_encoder: the module was given `encoder_hidden_states`. wants_gradients: of its `hidden_states`.
        """
        # In other families, the next call may have its keys from elsewhere.
        if reason in (OTHER_TOKENS, UNKNOWN_TEXT):
            return has_encoder and self.family.text == "none"
        if reason == WANTS_GRADIENTS:
            return wants_gradients
        return reason.startswith(OTHER_MASK) or reason.startswith(TOO_SHORT)


def _differ(length: int, other: int) -> bool:
    """Tells whether lengths differ; a graph takes those that only the device knows for equal."""
    return guard_or_false(length != other)


def _shares_memory(x: torch.Tensor) -> bool:
    """Tells whether elements of x share memory; in a compiled graph, whether x was expanded."""
    if torch.compiler.is_compiling():  # to order strides would tie the graph to their order
        return any(stride == 0 and size != 1 for stride, size in zip(x.stride(), x.shape, strict=True))
    return may_overlap(x) != 0 and aliases(x)  # 0: surely none


def masks_of_keys(mask: torch.Tensor | None, key: torch.Tensor) -> torch.Tensor | None:
    """A mask that masks keys alone, as `[batch, keys]`."""
    if mask is None:
        return None
    of_batch = mask[:, 0, 0] if mask.ndim == 4 else mask[(0,) * (mask.ndim - 1)][None]
    return of_batch.expand(key.shape[0], -1)


def _why_other_mask(mask: torch.Tensor, key: torch.Tensor) -> str:
    """The reason for which `mask` does not mask keys alone, the same for every head and query; empty if it does."""
    if mask.dtype != torch.bool:
        return f"{OTHER_MASK}: numbers are added to the scores"
    if not 2 <= mask.ndim <= 4 or mask.shape[-1] != key.shape[-2]:
        return f"{OTHER_MASK}: it has {mask.ndim} dimensions and {mask.shape[-1]} keys"
    if mask.shape[-2] != 1 and mask.stride(-2) != 0:
        return f"{OTHER_MASK}: each query has its own"
    if mask.ndim > 2 and mask.shape[-3] != 1 and mask.stride(-3) != 0:
        return f"{OTHER_MASK}: each head has its own"
    if mask.ndim == 4 and mask.shape[0] not in (1, key.shape[0]):
        return f"{OTHER_MASK}: it is for another batch"
    return ""


def _why_another_attends() -> str:
    """The reason for which a function mode around the model may attend in its own way; empty if there is none."""
    for mode in function_modes():
        if isinstance(mode, AttentionScoreSkipFunctionMode):
            return "a guider skips attention scores"
        kind = type(mode)
        if not kind.__module__.startswith(HARMLESS_MODES):
            return f"{kind.__module__}.{kind.__qualname__} may attend in its own way: it is a torch function mode"
    return ""
