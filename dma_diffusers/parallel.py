"""Attention over several GPUs by Diffusers' context parallelism: Ulysses, ring, or both.

Each GPU has a part of the model's tokens. Under Ulysses it gives most of its heads away and gets the other parts of
those that remain, so that it attends over whole sequences. Under ring it keeps its queries, and attends to one chunk of
keys after the other; the log-sum-exps say how the results are merged. Diffusers exchanges and merges; what it calls in
between is ours. Under both, a chunk has as many parts as Ulysses has GPUs.

Most models split their text and their other tokens each on its own, so that every part begins or ends with some text.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from itertools import count
from typing import Any

import torch
import torch.distributed as dist

from dma_diffusers.families import Family
from dma_diffusers.internals import (
    AttentionBackendName,
    active_backend,
    context_parallel_attention,
    dispatch_attention_fn,
    has_context_parallelism,
)
from dma_diffusers.kernels.operator import Result
from dma_diffusers.kernels.tiling.policies import Diagonal, Policy, Union, parse

TextRange = tuple[int, int] | None


@dataclass(frozen=True)
class Spread:
    """The GPUs over which a model's attention is spread; equal ones compare equal.

    context: Diffusers' `ContextParallelConfig`, which was set up. parallel: the `ParallelConfig` that has it.
    splits_text: every part has as much text as the others; else text and other tokens are split as one sequence.
    """

    context: Any
    parallel: Any
    splits_text: bool = True

    @classmethod
    def of(cls, parallel_config: Any, splits_text: bool = True) -> "Spread | None":
        """The spread that Diffusers' `ParallelConfig` asks for; None for none, or for another kind of parallelism."""
        context = getattr(parallel_config, "context_parallel_config", None)
        return None if context is None else cls(context, parallel_config, splits_text)

    @property
    def ulysses(self) -> int:
        """The number of GPUs that exchange heads, which is the number of parts of a sequence that is attended over."""
        return self.context.ulysses_degree

    @property
    def ring(self) -> int:
        """The number of chunks of keys."""
        return self.context.ring_degree

    @property
    def gpus(self) -> int:
        """The number of parts of the model's tokens."""
        return self.ulysses * self.ring

    def __str__(self) -> str:
        kinds = [("Ulysses", self.ulysses), ("ring", self.ring)]
        return " and ".join(f"{kind} over {degree} GPUs" for kind, degree in kinds if degree > 1)

    def text_range(
        self,
        family: Family,
        queries: int,
        keys: int,
        hidden: int,
        encoder: int,
        model: int | None,
        grid: int | None,
    ) -> TextRange:
        """`Family.text_range` of one part if it has text of its own, else of all parts together.

        queries, keys, hidden, encoder: numbers of tokens of one part. model, grid: of all parts.
        """
        if not self.splits_text:
            queries, keys, hidden, encoder = (part * self.gpus for part in (queries, keys, hidden, encoder))
            return family.text_range(queries, keys, hidden, encoder, model, grid)
        model, grid = (None if total is None else total // self.gpus for total in (model, grid))
        return family.text_range(queries, keys, hidden, encoder, model, grid)

    def why_stock(
        self, query: torch.Tensor, key: torch.Tensor, attn_mask: torch.Tensor | None, text: TextRange
    ) -> str:
        """The reason for which a call falls back to stock attention over these GPUs; empty if it need not.

        query, key: `[B, H, S, D]`, of one part. text: as of `text_range`.
        Raises ValueError where stock can't be right either: there are not the heads to share out, or it would read a
        mask of all tokens in another order than that of the parts.
        """
        if query.shape[1] != key.shape[1]:
            return "fewer heads of keys than of queries, over several GPUs"
        has_text = text is not None and text[1] > text[0]
        if has_text and self.ring > 1 and not self.splits_text:
            return "a ring of whose chunks only the first or the last have text: use Ulysses"
        is_uneven = self.context.ulysses_anything or self.context.ring_anything
        if is_uneven and (has_text or attn_mask is not None):
            name = "ulysses_anything" if self.context.ulysses_anything else "ring_anything"
            return f"text or a mask under {name}: parts may be of different lengths"
        if has_text and attn_mask is not None and attn_mask.shape[-1] != key.shape[-2]:
            raise ValueError(
                f"a mask over {attn_mask.shape[-1]} keys where each of {self.gpus} GPUs has {key.shape[-2]}: "
                "split it in the cp_plan, as the text is, or leave the mask out"
            )
        if query.shape[1] % self.ulysses and not is_uneven:
            raise ValueError(
                f"Ulysses shares heads out: {self.ulysses} GPUs must divide them, got {query.shape[1]} heads; "
                "choose another ulysses_degree, ulysses_anything=True, or ring_degree"
            )
        return ""

    def check(self, policies: Iterable[Policy]) -> None:
        """Raises ValueError for a policy that the ring can't have, because it needs all keys at once."""
        if self.ring > 1 and (on_grid := [policy for policy in policies if policy.on_grid]):
            raise ValueError(
                f"{on_grid[0]} needs the whole grid, of which a ring shows one chunk at a time: "
                f"use Ulysses, ContextParallelConfig(ulysses_degree={self.gpus}), or a policy without a grid"
            )

    def arguments(self, arguments: dict[str, Any], heads: int, chunk: int | None = None) -> dict[str, Any]:
        """The operator's keyword arguments on this GPU, from those for all heads of one part.

        heads: of the queries, on this GPU. chunk: the ring's chunk of keys that is attended to; None without a ring.
        """
        first = self.context._ulysses_local_rank * heads
        own = 0 if self.ring == 1 else self.context._ring_local_rank
        policy = _local(arguments["policy"], (first, first + heads), chunk in (None, own), not chunk)
        has_text = arguments["text_stop"] > arguments["text_start"]
        own = {"policy": policy, "parts": self.ulysses if has_text and self.splits_text else 1}
        # Over a ring, calls whose policy is on the grid are those with every tile HIGH (`check`).
        return arguments | own | ({"grid": ()} if self.ring > 1 else {})

    def attention(
        self,
        attend: Callable[..., Result],
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_mask: torch.Tensor | None,
        scale: float | None,
        **arguments,
    ) -> torch.Tensor:
        """Attention over all GPUs, with `attend` for what each of them attends to.

        attend: takes what `operator.attention` takes. query, key, value: `[B, H, S, D]`, of this GPU's part, as is the
        result. key_mask: bool `[B, S]` of this part; every GPU's is gathered, for Diffusers' ring passes the first
        chunk's to all of them. arguments: as those of `operator.attention`, for one part.
        """
        masks = None if key_mask is None else self._gathered(key_mask)
        steps = count()

        def forward_op(
            ctx, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False,
            return_lse=False, _save_ctx=True, _parallel_config=None,
        ):  # fmt: skip
            chunk = 0
            if self.ring > 1:
                chunk = (self.context._ring_local_rank + next(steps)) % self.ring
            out, lse, _ = attend(
                *(x.permute(0, 2, 1, 3) for x in (query, key, value)),
                key_mask=None if masks is None else masks[chunk], scale=scale, is_causal=False, return_lse=return_lse,
                **self.arguments(arguments, query.shape[2], chunk if self.ring > 1 else None),
            )  # fmt: skip
            out = out.permute(0, 2, 1, 3)
            # Two chunks of which a query sees nothing would be merged to NaN.
            return (out, lse.clamp(min=NOTHING).transpose(1, 2)) if return_lse else out

        out = context_parallel_attention(
            *(x.permute(0, 2, 1, 3) for x in (query, key, value)), scale=scale,
            forward_op=forward_op, backward_op=None, _parallel_config=self.parallel,
        )  # fmt: skip
        return out.permute(0, 2, 1, 3)

    def stock_attention(
        self,
        reason: str,
        backend: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None,
        **arguments,
    ) -> torch.Tensor:
        """Diffusers' own attention over all GPUs; query, key, value and the result are `[B, S, H, D]`, of one part.

        reason: why it runs. backend: the module's; None for the process's. arguments: as of `dispatch_attention_fn`.
        Raises ValueError if it can't run either: the backend has no ring, or the ring would mix up masks.
        """
        self.check_backend(backend)
        if self.ring > 1:
            refused = f"{reason}: this call falls back to stock attention, "
            advice = "use Ulysses (ulysses_degree) in its place"
            if _name(backend) is AttentionBackendName.NATIVE:
                raise ValueError(
                    f"{refused}which has no ring in PyTorch's own backend: {advice}, or another backend "
                    "(set_attention_backend)"
                )
            if attn_mask is not None:
                raise ValueError(f"{refused}whose ring has one mask for all chunks: {advice}")
        return dispatch_attention_fn(
            query, key, value, attn_mask, **arguments, backend=backend, parallel_config=self.parallel
        )

    def check_backend(self, backend: Any) -> None:
        """Raises ValueError for an attention backend that would attend to this GPU's part alone.

        Diffusers looks for such when parallelism is enabled; a backend may be chosen afterwards, or for stock attention
        where DMA is applied. backend: a module's; None for the process's.
        """
        if not has_context_parallelism(_name(backend)):
            raise ValueError(
                f"stock attention's backend {_name(backend).value!r} has no context parallelism: choose one that has, "
                "such as model.set_attention_backend('native')"
            )

    def _gathered(self, key_mask: torch.Tensor) -> torch.Tensor:
        """The masks of the ring's chunks: bool `[ring, B, keys]`, from `[B, S]` of this GPU's part."""
        own = key_mask.to(torch.uint8).contiguous()
        parts = own.new_empty(self.ring, self.ulysses, *own.shape)
        dist.all_gather_into_tensor(parts.flatten(0, 2), own, group=self.context._flattened_mesh.get_group())
        return parts.transpose(1, 2).flatten(2) != 0


def _name(backend: Any) -> AttentionBackendName:
    """A backend by name; None is the process's."""
    return AttentionBackendName(backend or active_backend()[0])


def splits_text(model: torch.nn.Module) -> bool:
    """Tells whether context parallelism splits a model's text on its own; it is assumed of a plan of the user's."""
    plan = getattr(type(model), "_cp_plan", None)
    return plan is None or any(
        "encoder_hidden_states" in inputs for inputs in plan.values() if isinstance(inputs, dict)
    )


NOTHING = -1e4
"""The log-sum-exp of a query that sees no key of a chunk, in place of −inf."""


@torch.compiler.assume_constant_result
def _local(words: str, heads: tuple[int, int], is_own: bool, is_first: bool) -> str:
    """The words of the policy for these heads; a band is in the own chunk of a ring alone, a sink in the first."""
    return _local_words(words, heads, is_own, is_first)


@cache
def _local_words(words: str, heads: tuple[int, int], is_own: bool, is_first: bool) -> str:
    return str(_local_policy(parse(words), heads, is_own, is_first))


def _local_policy(policy: Policy, heads: tuple[int, int], is_own: bool, is_first: bool) -> Policy:
    if isinstance(policy, Union):
        return replace(
            policy, members=tuple(_local_policy(each, heads, is_own, is_first) for each in policy.members)
        )
    if not isinstance(policy, Diagonal):
        return policy
    window = policy.windows[slice(*heads)] if policy.heads else policy.window
    return replace(policy, window=window if is_own else 0, sink=policy.sink if is_first else 0)
