"""The interception of a module's attention operations: the operator runs them, or they fall back, and are counted."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch.nn import functional

from dma_diffusers import unmet
from dma_diffusers.config import DMAConfig
from dma_diffusers.decision import (
    GRADIENTS_OF_SEVERAL_GPUS,
    NOT_RUNNING,
    RUNS_ANEW,
    Decision,
    masks_of_keys,
)
from dma_diffusers.families import Family
from dma_diffusers.forward import DIGITS, ForwardContext
from dma_diffusers.guard import REPLAYED, TURNED, Level, Watch
from dma_diffusers.internals import is_exporting, runs_backward
from dma_diffusers.kernels import operator
from dma_diffusers.kernels.backward.reference import why_not
from dma_diffusers.kernels.call import Norms, Rope
from dma_diffusers.kernels.lowerings import architecture
from dma_diffusers.memory import ModuleMemory
from dma_diffusers.parallel import Spread
from dma_diffusers.receipt import ModuleReceipt
from dma_diffusers.stages import ModuleStages

logger = logging.getLogger("dma_diffusers")


FUSES = "norm and RoPE of q and k are in the operator"
_MOST_KINDS = 1024


class Change(Protocol):
    """Norm and RoPE that the operator applies to q and k, in the stock processor's place."""

    @property
    def norms(self) -> Norms: ...

    @property
    def rope(self) -> Rope: ...

    def applied(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...


class ProcessorCall(Protocol):
    """One call of a stock processor, and what became of its attention operations.

    hidden, encoder: numbers of tokens of the `hidden_states` and `encoder_hidden_states` that the module was given.
    reasons: for each operation the reason for which it fell back, empty if the operator took it.
    change: what the operator is to do to q and k first, in the stock processor's place; None for nothing.
    spread: the GPUs that exchange heads around a `scaled_dot_product_attention` of the call, which then has all parts
        of the sequence; None for one GPU. backend: the module's own, for calls over several GPUs that fall back.
    """

    backend: Any
    change: Change | None
    spread: Spread | None
    hidden: int
    encoder: int
    reasons: list[str]


class Interception:
    """Runs the attention operations of one module, each by the operator or by stock attention, and counts them.

    own: what the module runs at each noise level.
    head_dim: of the module if it tells, else None until its first call.
    stand_in: runs the calls in the operator's place, with its arguments and its result; None for the operator.
    watch: the guard's watch over the operator's calls; None for none. memory: what importance remembers; None for none.
    """

    def __init__(self, own: ModuleStages, family: Family, forward: ForwardContext, head_dim: int | None):
        self.own = own
        self.family = family
        self.forward = forward
        self.configs = tuple(own.entries[entry].config for entry in own.of_stage)  # of stages
        kinds = forward.stages.kinds if forward.stages else (0,) * len(self.configs)
        of_kinds = [self.configs[kinds.index(kind)] for kind in range(max(kinds) + 1)]
        no_backward = [""] * len(of_kinds)
        for kind, config in zip(kinds, self.configs, strict=True):
            no_backward[kind] = no_backward[kind] or why_not(config.asked)
        self.decisions = tuple(
            Decision(config, family, own.needs_grid, refusal)
            for config, refusal in zip(of_kinds, no_backward, strict=True)
        )
        self._arguments_of = tuple(
            config.arguments((0, 0)) | {"masks_text": family.masks_text} for config in of_kinds
        )
        for config in self.configs:
            if config.words not in forward.policies:
                forward.policies.append(config.words)
        # An empty tensor has the numbers of the stages' policies, from 1, as the digits of its length: torch.compile
        # takes integers for constants, and lengths of 0 and 1.
        numbers = [forward.policies.index(config.words) + 1 for config in self.configs]
        digits = sum(number * DIGITS ** (stage + 1) for stage, number in enumerate(numbers))
        self._numbers = torch.empty(digits, 0, device="cpu")
        # All stages have the grid, to share graphs, and what is kept for calls of one size.
        self.has_grid = any(config.asked.on_grid for _, config in own.config.entries)
        self.stand_in: Callable[..., operator.Result] | None = None
        self.watch: Watch | None = None
        self.memory: ModuleMemory | None = None
        self.calls = [0] * len(self.configs)  # that were intercepted, by stage
        self.fallbacks: Counter[str] = Counter()
        self._stock_kinds: dict[tuple, tuple[str, ...]] = {}
        self.inexact_rows: list[torch.Tensor] = []  # a sum for each device that was seen
        self.fuses = False  # whether the operator took over the norm and the RoPE of a call
        self.device: torch.device | None = None
        self.spread: Spread | None = None  # of the last call that the operator took
        self.head_dim = head_dim
        forward.listeners.append(self)

    @property
    def intercepted(self) -> int:
        """The number of calls that the operator took."""
        return sum(self.calls)

    @property
    def decision(self) -> Decision:
        """The decision about operations of this step."""
        return self.decisions[self.forward.call.kind]

    def all_fall_back(self, device: torch.device) -> bool:
        """Tells whether every call on `device` falls back, so that the stock processor can run as it is.

        Counts the call if so.
        """
        reason = self.head_dim and self.decision.limits(device, self.head_dim)[0]
        if reason:
            self.fall_back(reason)
            self._announce(device)
        return bool(reason)

    def falls_back(self, hidden: torch.Tensor, arguments: Sequence[Any]) -> bool:
        """Tells whether a call of the module with these arguments is known to fall back as a whole; counts it if so.

        hidden: the `hidden_states` among the arguments.
        """
        reasons = self._stock_kinds and self._stock_kinds.get(self._kind(hidden, arguments))
        for reason in reasons or ():
            self.fall_back(reason)
        return bool(reasons)

    def fall_back(self, reason: str) -> str:
        """Counts a call that falls back, and gives its reason back."""
        if not torch.compiler.is_compiling():  # a counter would recompile the graph at every call
            self.fallbacks[reason] += 1
        return reason

    def learn(self, hidden: torch.Tensor, arguments: Sequence[Any], call: ProcessorCall) -> None:
        """Keeps in mind that such calls fall back as a whole, if `call`, which had them, did for reasons that last."""
        if not call.reasons or not all(call.reasons) or self.family.squares_masks:
            return
        has_encoder, wants_gradients = bool(call.encoder), _wants_gradients(hidden)
        if all(self.decision.lasts(reason, has_encoder, wants_gradients) for reason in call.reasons):
            if len(self._stock_kinds) >= _MOST_KINDS:
                self._stock_kinds.clear()
            self._stock_kinds[self._kind(hidden, arguments)] = tuple(call.reasons)

    def attention(self, call: ProcessorCall, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False,
                  scale=None, enable_gqa=False):  # fmt: skip
        """Runs a `scaled_dot_product_attention` of the module, by the operator where it can."""
        spread = call.spread
        # Some calls over several GPUs exchange no heads, such as cross-attention to text that every GPU has.
        if spread is not None and key.shape[-2] != spread.ulysses * (call.hidden + call.encoder):
            spread = None
        text = self._text_range(call, query, key, spread, 1 if spread is None else spread.ulysses)
        reason = self._why_stock(query, key, value, attn_mask, dropout_p, scale, enable_gqa, text)
        if spread is not None:
            reason = reason or self._why_not_spread(query, key, value)
        call.reasons.append(reason)
        change = call.change
        if reason:
            self.fall_back(reason)
            if change is not None:
                query, key = change.applied(query, key)
            return functional.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        self._take(query, spread)
        arguments = self._arguments(text, spread)
        if spread is not None:
            arguments = spread.arguments(arguments, query.shape[1])
        if change is not None:
            rope = change.rope
            arguments |= {"norms": change.norms, "q_rope": rope, "k_rope": rope}
            if not torch.compiler.is_compiling():
                self.fuses = True
        mask = masks_of_keys(attn_mask, key)
        return self._attend(
            query, key, value, key_mask=mask, scale=scale, is_causal=is_causal, **arguments
        ).out

    def spread_attention(
        self, call: ProcessorCall, spread: Spread, query, key, value, attn_mask=None, dropout_p=0.0,
        is_causal=False, scale=None, enable_gqa=False, attention_kwargs=None,
    ) -> torch.Tensor:  # fmt: skip
        """Runs a `dispatch_attention_fn` over several GPUs, by the operator where it can; tensors are `[B, S, H, D]`.

        Raises ValueError for a policy that the spread can't have, and where stock attention can't run either.
        """
        q, k, v = (x.permute(0, 2, 1, 3) for x in (query, key, value))
        mask = attn_mask
        if mask is not None and mask.shape == (key.shape[0], key.shape[1]):
            mask = mask[:, None, None]
        text = self._text_range(call, q, k, spread)
        spread_reason = spread.why_stock(q, k, mask, text)  # first, for it raises where stock would be wrong
        reason = self._why_stock(q, k, v, mask, dropout_p, scale, enable_gqa, text, spread.gpus)
        reason = reason or spread_reason or self._why_not_spread(q, k, v)
        if not reason and (is_causal or attention_kwargs):
            reason = "a causal call, or one with attention_kwargs, over several GPUs"
        call.reasons.append(reason)
        if reason:
            self.fall_back(reason)
            return spread.stock_attention(
                reason, call.backend, query, key, value, attn_mask, dropout_p=dropout_p, is_causal=is_causal,
                scale=scale, enable_gqa=enable_gqa, attention_kwargs=attention_kwargs,
            )  # fmt: skip
        spread.check([self.configs[self.forward.call.stage].asked])
        self._take(q, spread)
        arguments = self._arguments(text, spread)
        out = spread.attention(self._attend, q, k, v, masks_of_keys(mask, k), scale, **arguments)
        return out.permute(0, 2, 1, 3)

    def met_no_attention(self, processor: str) -> None:
        """Counts a call of the module whose processor, of this name, could not be intercepted; warns once."""
        reason = self.fall_back(unmet.reason_of(processor))
        if not self.forward.warned:
            self.forward.warned = True
            unmet.warn(self.forward.model, reason)

    def receipt(self, module: str, device: torch.device) -> ModuleReceipt:
        """The receipt of the module of this name, on the device of its last call, or else on `device`.

        It says that stock attention runs where that was so in every call. It waits for a device that has counted
        inexact rows.
        """
        device = self.device or device
        lowering, reason = self._choice(device)
        if self.fallbacks and not self.intercepted:
            lowering, reason = "stock", "; ".join(self.fallbacks)
        watch = self.watch
        if watch is not None and watch.level is Level.STOCK:
            lowering, reason = "stock", TURNED
        notes = (
            *self.forward.notes, *self.notes(self.forward.grid), self._spread_note(), FUSES * self.fuses,
            REPLAYED if watch is not None and watch.replayed else "", str(self.memory or ""),
        )  # fmt: skip
        return ModuleReceipt(
            module, lowering, self.own.config.high, self.own.config.low, self._policy(), reason,
            self.intercepted, dict(self.fallbacks), architecture(device),
            sum(int(rows) for rows in self.inexact_rows), tuple(filter(None, notes)), self._by_entry(),
            *((None, 0, ()) if watch is None else (watch.relative_error, watch.sampled_rows, tuple(watch.turned))),
        )  # fmt: skip

    def notes(self, grid: tuple[int, ...]) -> list[str]:
        """Sentences about what policies change for a grid; () for none. Raises ValueError for one they can't have."""
        asked = [config.asked for _, config in self.own.entries if grid or not config.asked.on_grid]
        return list(dict.fromkeys(note for policy in asked for note in policy.notes(grid)))

    def _text_range(
        self, call: ProcessorCall, query, key, spread: Spread | None, parts: int = 1
    ) -> tuple[int, int] | None:
        """The text among the keys of a call, or of one of its parts over several GPUs."""
        grid = self.forward.grid
        find = self.family.text_range if spread is None else partial(spread.text_range, self.family)
        return find(
            query.shape[-2] // parts, key.shape[-2] // parts, call.hidden, call.encoder, self.forward.text_length,
            math.prod(grid) if grid else None,
        )  # fmt: skip

    def _arguments(self, text: tuple[int, int] | None, spread: Spread | None = None) -> dict[str, Any]:
        """Keyword arguments of the operator, for a call with this text."""
        call = self.forward.call
        start, stop = self.decision.config.protected(text or (0, 0))
        own = self._arguments_of[call.kind] | {
            "grid": self.forward.grid if self.has_grid else (), "text_start": start, "text_stop": stop
        }  # fmt: skip
        if not torch.compiler.is_compiling() or len(self.forward.policies) == 1 or spread is not None:
            return own | {"policy": self.configs[call.stage].words}
        # All modules, and stages of one kind, have the same constants, so that their blocks share graphs.
        number = self._numbers.shape[0] // call.digit.shape[0] % DIGITS
        return own | {"policy": self.forward.policies, "which": number - 1}

    def _attend(self, query, key, value, **arguments) -> operator.Result:
        observer = self.memory or self.watch  # the memory hands its calls to the watch
        # A checkpoint runs a call twice, the second time with gradients. Observers see no call with gradients, so they
        # must not change the first run either.
        is_observed = self.stand_in is None and not is_exporting() and not self.forward.call.trains
        if observer is not None and is_observed:
            arguments["observer"] = observer.handle
        result = (self.stand_in or operator.attention)(query, key, value, **arguments)
        self._count_inexact(result.inexact_rows)
        return result

    def _spread_note(self) -> str:
        return "" if self.spread is None else f"context parallelism: {self.spread}"

    def _why_not_spread(self, *tensors: torch.Tensor) -> str:
        """The reason for which a call over several GPUs falls back: nothing sends gradients from one to another."""
        wants_gradients = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        return GRADIENTS_OF_SEVERAL_GPUS if wants_gradients or self.forward.call.trains else ""

    def _why_stock(self, *operation) -> str:
        now = self.forward.call
        if not now.is_running:  # facts of another call would be believed
            self._check_runs_anew()
            return NOT_RUNNING
        # Checkpoints first run without gradients, and must take the same way then.
        return self.decision.why_stock(*operation) or (self.decision.why_no_gradients() if now.trains else "")

    def _check_runs_anew(self) -> None:
        """Raises ValueError where a checkpoint would have stock's gradients for what the operator computed."""
        may_be_ours = self.configs[0].lowering not in ("fastest", "stock")
        if may_be_ours and not torch.compiler.is_compiling() and runs_backward():
            raise ValueError(RUNS_ANEW)

    def _kind(self, hidden: torch.Tensor, arguments: Sequence[Any]) -> tuple:
        """The kind of a call: calls with tensors of the same shapes and with the same options are of one kind."""
        now = self.forward.call
        running = now.is_running, now.trains, now.kind, self.forward.text_length
        return hidden.device, _wants_gradients(hidden), *running, *map(_outline, arguments)

    def _choice(self, device: torch.device) -> tuple[str | None, str]:
        """The lowering on a device, and its reason; those of all entries where they differ."""
        if self.head_dim is None:
            return None, "not called yet"
        choices = [_choice(config, device, self.head_dim) for _, config in self.own.entries]
        lowerings, reasons = (dict.fromkeys(parts) for parts in zip(*choices, strict=True))
        return " or ".join(lowerings), "; ".join(reasons)

    def _by_entry(self) -> dict[str, int]:
        """The number of calls that the operator took under each entry, by its words; empty for a single one."""
        words = self.own.words
        found = dict.fromkeys(words, 0)
        for entry, calls in zip(self.own.of_stage, self.calls, strict=True):
            found[words[entry]] += calls
        return found if len(words) > 1 else {}

    def _policy(self) -> str:
        if self.watch is not None and self.watch.level is Level.HIGH:
            return operator.DENSE
        config = self.own.config
        said = [
            f" {name}={value}"
            for name in ("rotation", "smooth_k", "smooth_v", "backward")
            if (value := getattr(config, name)) not in ("none", True, "bf16")
        ]
        text = "" if config.protect_text else " without protected text"
        return "; ".join(self.own.words) + "".join(said) + text

    def _take(self, query: torch.Tensor, spread: Spread | None) -> None:
        if not torch.compiler.is_compiling():
            self.calls[self.forward.call.stage] += 1
            self.spread = spread
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
        if not self.forward.announced and not torch.compiler.is_compiling():
            self.forward.announced = True
            logger.info("%s: %s", self.forward.model, self.receipt("", device))


def _choice(config: DMAConfig, device: torch.device, head_dim: int) -> tuple[str, str]:
    """The lowering that a configuration takes on a device, and the reason."""
    if reason := config.why_stock(device, head_dim):
        return "stock", reason
    try:
        chosen = operator.choose(device, head_dim, config.high, config.low, config.operator_lowering)
    except ValueError as refusal:
        return "none", str(refusal)
    return chosen.lowering, chosen.reason


def _wants_gradients(hidden: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and hidden.requires_grad


def _outline(argument: Any) -> Any:
    """A tensor's shape and dtype, a plain value itself, and the name of the type of anything else."""
    if isinstance(argument, torch.Tensor):
        return argument.shape, argument.dtype
    return argument if isinstance(argument, bool | int | str | None) else type(argument).__name__
