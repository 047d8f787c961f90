"""One attention operation on its way through a stock processor: taken by the operator, or left to stock."""

import inspect
import logging
import math
import operator as operators
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from dma_diffusers.config import DMAConfig
from dma_diffusers.families import Family
from dma_diffusers.kernels import operator
from dma_diffusers.kernels.lowerings import architecture
from dma_diffusers.receipt import ModuleReceipt

logger = logging.getLogger("dma_diffusers")

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Forward:
    """What all attention modules of a model need to know of its running forward call.

    dense_above_sigma: steps with a higher noise level run with every tile HIGH; None for no such step.
    wants_grid: whether a policy needs to know what the tokens lie on; the family must know how to find it.
    note: where dense steps and layers come from; empty for nowhere.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        family: Family,
        dense_above_sigma: float | None,
        wants_grid: bool = False,
        note: str = "",
    ):
        self.family = family
        self.dense_above_sigma = dense_above_sigma
        self.wants_grid = wants_grid
        self.note = note
        self.parameters = tuple(inspect.signature(type(model).forward).parameters)[1:]
        self.model = type(model).__name__
        self.announced = False
        # Empty tensors hold lengths: torch.compile would take integers for constants, and recompile.
        self._text: torch.Tensor | None = None
        self._grid: torch.Tensor | None = None
        self.checked: set[tuple[int, ...]] = set()  # grids
        self.diversions: list[Diversion] = []

    @property
    def text_length(self) -> int | None:
        """Tokens of text that the model was given; None for none."""
        return None if self._text is None else self._text.shape[0]

    @property
    def grid(self) -> tuple[int, ...]:
        """What the tokens other than text lie on; () where nobody needs it, or the call does not tell."""
        return () if self._grid is None else tuple(self._grid.shape[:-1])

    @property
    def hook(self) -> Callable[..., None]:
        """The forward pre-hook that observes what is asked for."""
        reads = (self.wants_grid and self.family.grid_on_device) or self.dense_above_sigma is not None
        return self.observe_on_device if reads else self.observe

    def observe(self, model: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """A forward pre-hook: the length of the text, and the grid if a policy or the family needs it."""
        call = self._named(args, kwargs)
        text = call.get("encoder_hidden_states")
        self._text = torch.empty(text.shape[1], 0) if isinstance(text, torch.Tensor) else None
        if self.wants_grid or self.family.pads_grid:
            grid = self.family.grid(model, call) if self.wants_grid else self._find_grid(model, call)
            self._grid = torch.empty(*grid, 0) if grid else None
            if not torch.compiler.is_compiling():
                self._check(grid)

    @torch.compiler.disable  # reading would break a graph; a compiled model's hooks run before its own
    def observe_on_device(self, model: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """A forward pre-hook: `observe`, and whether the noise level asks for HIGH everywhere."""
        self.observe(model, args, kwargs)
        if self.dense_above_sigma is not None:
            dense = bool(self.noise_level(args, kwargs) > self.dense_above_sigma)
            for diversion in self.diversions:
                diversion.mapped = not (dense or diversion.dense)

    def find_grid(self, model: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[int, ...]:
        """What a forward call's tokens lie on; () if that is not known."""
        return self._find_grid(model, self._named(args, kwargs))

    def noise_level(self, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor | None:
        """The highest sigma (0 to 1) of a forward call's batch, on its device; None if the scale is not known."""
        return self.family.noise_level(self._named(args, kwargs)[self.family.timestep])

    def _find_grid(self, model: torch.nn.Module, call: dict[str, Any]) -> tuple[int, ...]:
        try:
            return self.family.grid(model, call) if self.family.grid else ()
        except ValueError:
            return ()

    def _check(self, grid: tuple[int, ...]) -> None:
        """Logs what policies change for a grid that is new; raises ValueError for one that they can't have."""
        if grid not in self.checked:
            notes = dict.fromkeys(note for diversion in self.diversions for note in diversion.notes(grid))
            for note in notes:
                logger.warning("%s: %s", self.model, note)
            self.checked.add(grid)

    def _named(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        return dict(zip(self.parameters, args, strict=False)) | kwargs


class Diversion:
    """Decides about the attention operations of one module, runs those it takes, and counts.

    stand_in: what runs them in the operator's place, with its arguments and its result; None for the operator.
    """

    def __init__(
        self, config: DMAConfig, family: Family, forward: Forward, dense: bool, head_dim: int | None
    ):
        self.config = config
        self.family = family
        self.forward = forward
        self.dense = dense
        _ = config.words  # made here once, and not in a graph
        self.stand_in: Callable[..., operator.Result] | None = None
        self.mapped = not dense  # the one flag that a call reads: a compiled block has two versions, not more
        self.diverted = 0
        self.in_dense_steps = 0
        self.left: Counter[str] = Counter()
        self.inexact_rows: list[torch.Tensor] = []  # a sum for each device that was seen
        self.device: torch.device | None = None
        self.head_dim = head_dim
        forward.diversions.append(self)

    def leaves_all(self, device: torch.device) -> bool:
        """Whether every call on `device` is left to stock, so that the stock processor may run untouched."""
        reason = self.head_dim and self.config.why_stock(device, self.head_dim)
        if reason and not torch.compiler.is_compiling():
            self._left(reason)
            self._announce(device)
        return bool(reason)

    def attention(self, hidden, encoder, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False,
                  scale=None, enable_gqa=False):  # fmt: skip
        """`scaled_dot_product_attention`, by the operator where it can.

        hidden, encoder: tokens of the `hidden_states` and `encoder_hidden_states` that the module was given.
        """
        grid = math.prod(self.forward.grid) if self.forward.grid else None
        text = self.family.text_range(key.shape[-2], hidden, encoder, self.forward.text_length, grid)
        reason = self._why_stock(query, key, value, attn_mask, dropout_p, scale, enable_gqa, text)
        if reason:
            self._left(reason)
            return scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        self._diverted(query)
        attend = self.stand_in or operator.attention
        result = attend(
            query, key, value, key_mask=_key_mask(attn_mask, key), scale=scale, is_causal=is_causal,
            masks_text=self.family.masks_text, mapped=self.mapped, **self.config.arguments(text, self.forward.grid),
        )  # fmt: skip
        self._count_inexact(result.inexact_rows)
        return result.out

    def receipt(self, module: str, device: torch.device) -> ModuleReceipt:
        """What the module of this name runs on the device of its last call, or else on `device`, and why.

        Waits for a device that has counted inexact rows.
        """
        lowering, reason = self._choice(self.device or device)
        return ModuleReceipt(
            module, lowering, self.config.high, self.config.low, self._policy(), reason,
            self.diverted, dict(self.left), architecture(self.device or device),
            sum(int(rows) for rows in self.inexact_rows),
            tuple(filter(None, (self.forward.note, *self.notes(self.forward.grid)))), self.in_dense_steps,
        )  # fmt: skip

    def notes(self, grid: tuple[int, ...]) -> list[str]:
        """What the policy changes for a grid. Raises ValueError for one that it can't have."""
        return self.config.asked.notes(grid) if grid and self.config.asked.on_grid and not self.dense else []

    def _choice(self, device: torch.device) -> tuple[str | None, str]:
        config = self.config
        if self.head_dim is None:
            return None, "not called yet"
        if reason := config.why_stock(device, self.head_dim):
            return "stock", reason
        try:
            chosen = operator.choose(device, self.head_dim, config.high, config.low, config.operator_lowering)
        except ValueError as refusal:
            return "none", str(refusal)
        return chosen.lowering, chosen.reason

    def _policy(self) -> str:
        if self.dense:
            return "dense"
        words = self.config.words
        words += "" if self.config.protect_text else " without protected text"
        sigma = self.forward.dense_above_sigma
        return words if sigma is None else f"{words}, dense above sigma {sigma}"

    def _why_stock(self, query, key, value, attn_mask, dropout_p, scale, enable_gqa, text) -> str:
        """Why one call is left to stock; empty if it is not."""
        tensors = (query, key, value)
        if any(x.ndim != 4 or x.dtype not in DTYPES for x in tensors) or value.shape[-1] != query.shape[-1]:
            return "q, k and v are not [batch, heads, tokens, head_dim] in bf16, fp16 or fp32"
        if 0 in query.shape or 0 in key.shape:
            return "an empty call"
        if query.shape[0] != key.shape[0] or key.shape != value.shape:
            return "q, k and v of different batches, or k and v of different heads"
        if query.shape[-2] != key.shape[-2]:
            return "cross-attention: queries and keys are different tokens"
        if text is None:
            return "cross-attention, or a model's call that does not tell where text is"
        masked = "" if attn_mask is None else self.family.masked(self.config.protected(text))
        if reason := self.config.why_stock(query.device, query.shape[-1], masked):
            return reason
        if key.shape[-2] < (least := self.config.least_keys(query.device, query.shape[-1])):
            return f"fewer than {least} keys"
        if query.shape[1] != key.shape[1] and not enable_gqa:
            return "fewer heads of keys than of queries, without enable_gqa"
        if attn_mask is not None and not _masks_keys(attn_mask, key):
            return "a mask that is not boolean over keys alone"
        if scale is not None and not 0 < scale < math.inf:
            return "a scale that is not a positive number"
        if any(_shares_memory(x) for x in tensors):
            return "elements of q, k or v share memory, as after expand"
        if dropout_p > 0:
            return "dropout"
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            return "gradients are wanted, and there is no backward yet"
        if not torch.compiler.is_compiling() and any(
            isinstance(mode, AttentionScoreSkipFunctionMode) for mode in _get_current_function_mode_stack()
        ):
            return "a guider skips attention scores"
        return ""

    def _left(self, reason: str) -> None:
        if not torch.compiler.is_compiling():  # a counter would recompile the graph at every call
            self.left[reason] += 1

    def _diverted(self, query: torch.Tensor) -> None:
        if not torch.compiler.is_compiling():
            self.diverted += 1
            self.in_dense_steps += not (self.mapped or self.dense)
            self.device, self.head_dim = query.device, query.shape[-1]
            self._announce(query.device)

    def _count_inexact(self, rows: torch.Tensor) -> None:
        """Adds up on the device, which nothing waits for."""
        # Inductor makes no CUDA graph of what changes its inputs, so compiled graphs leave the sum alone.
        if torch.compiler.is_compiling() or not rows.numel():
            return
        total = next((total for total in self.inexact_rows if total.device == rows.device), None)
        if total is None:
            if rows.is_cuda and torch.cuda.is_current_stream_capturing():
                return  # a sum made here would be the graph's, and say nothing until it is replayed
            with torch.inference_mode(False):  # a tensor made in that mode could not be changed outside it
                total = torch.zeros(1, dtype=torch.int64, device=rows.device)
            self.inexact_rows.append(total)
        total += rows

    def _announce(self, device: torch.device) -> None:
        if not self.forward.announced:
            self.forward.announced = True
            logger.info("%s: %s", self.forward.model, self.receipt("", device))


class Diverting(TorchFunctionMode):
    """Hands each `scaled_dot_product_attention` inside to a module's diversion."""

    def __init__(self, diversion: Diversion, hidden: torch.Tensor, encoder: torch.Tensor | None):
        super().__init__()
        self.diversion = diversion
        self.hidden = hidden.shape[1]
        self.encoder = 0 if encoder is None else encoder.shape[1]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            return self.diversion.attention(self.hidden, self.encoder, *args, **kwargs)
        if func in _SQUARING and self.diversion.family.squares_masks and _is_mask(args[0]):
            return args[0]  # [B, 1, 1, S] all the way
        if func is torch.Tensor.unflatten:
            func = torch.unflatten  # torch.compile of PyTorch 2.11 cannot trace the method inside a mode
        return func(*args, **kwargs)


# What makes [B, 1, S, S] of a mask of keys: repeat(1, 1, S, 1), and `&` with the transpose (in a graph `and_`).
_SQUARING = (torch.Tensor.repeat, torch.Tensor.__and__, operators.and_)


def _is_mask(x: torch.Tensor) -> bool:
    return x.dtype == torch.bool and x.ndim == 4


def _shares_memory(x: torch.Tensor) -> bool:
    """Whether elements of x share memory; in a compiled graph, whether it was expanded."""
    if torch.compiler.is_compiling():  # to order strides would tie the graph to their order
        return any(stride == 0 and size != 1 for stride, size in zip(x.stride(), x.shape, strict=True))
    return operator.aliases(x)


def _masks_keys(mask: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether `mask` is boolean and the same for every head and query."""
    if mask.dtype != torch.bool or not 2 <= mask.ndim <= 4 or mask.shape[-1] != key.shape[-2]:
        return False
    return all(size == 1 for size in mask.shape[-3:-1]) and (
        mask.ndim < 4 or mask.shape[0] in (1, key.shape[0])
    )


def _key_mask(mask: torch.Tensor | None, key: torch.Tensor) -> torch.Tensor | None:
    """`mask` as `[batch, keys]`."""
    return None if mask is None else mask.reshape(-1, key.shape[-2]).expand(key.shape[0], -1)
