"""The guard: it samples each module's error while a model draws, and turns bad modules back to HIGH, then to stock.

A few rows of a few calls are compared with exact attention, on the device. Within a model's call, nothing waits for
that. With a finite bound, one wait at the end of each call of the model tells whether an estimate passed the bound, or
the output became non-finite. Such a call is made again, carefully: each module's output is looked at before the next
module runs, and is computed again by HIGH, then by stock attention, until it is good. So a drawing goes on from a good
step.
"""

import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from dma_diffusers.caches import empty_caches
from dma_diffusers.forward import ForwardContext
from dma_diffusers.internals import is_exporting
from dma_diffusers.kernels.attention.exact import exact_rows, of_rows
from dma_diffusers.kernels.call import Call
from dma_diffusers.kernels.device.memory import kept
from dma_diffusers.kernels.operator import DENSE, Asked, Result, handle_of
from dma_diffusers.kernels.plan import is_capturing
from dma_diffusers.kernels.quantiser.reference import changed_k, changed_q
from dma_diffusers.parallel import Spread

logger = logging.getLogger("dma_diffusers")

ROWS, KV_HEADS = 8, 4
"""So many rows are compared in a sampled call, of the query heads of so many key heads."""
_COST, _SHARE = 7500, 0.01
REPLAYED = "guard: nothing is looked at in what a CUDA graph replays"
TURNED = "the guard turned to it"


class Level(IntEnum):
    """How a module's calls run: as they ask, with every tile HIGH, or by stock attention."""

    ASKED = 0
    HIGH = 1
    STOCK = 2


def interval(queries: int) -> int:
    """The interval between sampled calls of so many queries, so that sampling should cost 1 % of the attention.

    A sample is counted as 7,500 rows of attention: 8 rows are multiplied in float32 and, which takes longer, keys and
    values of 4 heads go through memory as float32. The interval is odd, for calls with and without guidance often
    alternate.
    """
    return math.ceil(_COST / (_SHARE * queries)) | 1


def sampled_rows(queries: int, number: int) -> range:
    """Evenly spread rows among so many queries, others for each number."""
    step = max(1, queries // ROWS)
    start = (number + 1) * 40503 % step  # a multiplier that spreads the first few well
    return range(start, min(queries, start + step * ROWS), step)


def sampled_heads(kv_heads: int, number: int) -> range:
    """Some neighbouring heads among so many of keys, the next ones for each number."""
    start = number * KV_HEADS % kv_heads
    return range(start, min(kv_heads, start + KV_HEADS))


def squares(call: Call, out: torch.Tensor, rows: range) -> torch.Tensor:
    """The squared error and the squared norm of these rows of a call's output, float32 `[2]` on the device.

    Rows count whose exact result is finite.
    """
    exact = exact_rows(call, rows)
    counts = exact.isfinite().all(-1, keepdim=True)
    error = torch.where(counts, of_rows(out, rows).float() - exact, 0)
    return torch.stack((error.square().sum(), torch.where(counts, exact, 0).square().sum()))


def relative(sums: torch.Tensor) -> torch.Tensor:
    """The relative error `[…]` of sums of squared errors and squared norms `[…, 2]`; 0 where both are 0."""
    return (sums[..., 0] / sums[..., 1].clamp(min=torch.finfo(torch.float32).tiny)).sqrt()


class _Step(threading.local):
    """Facts about the model's call that runs in this thread.

    errors: for each device the largest relative error of the calls that were sampled, float32 `[]`.
    has_run: whether the operator ran in it. is_careful: whether it is made again, with every call looked at.
    """

    def __init__(self) -> None:
        self.errors: dict[torch.device, torch.Tensor] = {}
        self.has_run = False
        self.is_careful = False

    def __reduce__(self):  # a copy of the model runs no call
        return type(self), ()


class Guard:
    """The guard of one model.

    bound: the relative error above which a module turns back; infinite for the estimate alone, for which nothing waits.
    """

    def __init__(self, bound: float, forward: ForwardContext):
        self.bound = bound
        self.forward = forward
        self.watches: list[Watch] = []
        self.step = _Step()
        self.sums: dict[torch.device, torch.Tensor] = {}  # of squares since the start, float32 [modules, 2]

    def watch(self, name: str) -> "Watch":
        """The watch of the module of this name."""
        self.watches.append(Watch(self, name, len(self.watches)))
        return self.watches[-1]

    def hooks(self, model: torch.nn.Module) -> tuple[RemovableHandle, ...]:
        """Registers hooks on the model, around those of its forward context; none where nothing can turn back."""
        if math.isinf(self.bound):
            return ()
        return (
            model.register_forward_pre_hook(self.begin),
            model.register_forward_hook(self.end, with_kwargs=True),
        )

    @torch.compiler.disable
    def begin(self, model: torch.nn.Module, args: tuple) -> None:
        """Forgets the call before; a forward pre-hook."""
        self.step.has_run = False
        for device, errors in self.step.errors.items():
            if not (is_capturing(device) or is_exporting()):
                errors.zero_()

    @torch.compiler.disable  # reading would break a graph; a compiled model's hooks run outside of its own
    def end(self, model: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Gives the output of the call made again, where the one that ends is bad; a forward hook."""
        results = list(_floats(output))
        if self.step.is_careful or not self.step.has_run or not results or is_capturing(results[0].device):
            return None
        inputs = list(_floats((args, kwargs.get(self.forward.parameters[0]))))
        if not self._is_bad(model, results, inputs):
            return None
        self.step.is_careful = True
        try:
            empty_caches(model)  # which may have kept what was bad
            output = model(*args, **kwargs)
        finally:
            self.step.is_careful = False
        if not _are_finite(list(_floats(output)), results[0].device):
            logger.warning(
                "%s: guard: its output is not finite even so: no attention module that can turn makes bad numbers of "
                "finite q, k and v",
                self.forward.model,
            )
        return output

    def _is_bad(
        self, model: torch.nn.Module, results: list[torch.Tensor], inputs: list[torch.Tensor]
    ) -> bool:
        """Tells whether an error passed the bound, or the output isn't finite though the inputs are. It waits.

        GPUs that share the model's attention agree, since they make a call again together.
        """
        device = results[0].device
        passed = torch.zeros((), dtype=torch.bool, device=device)
        for error in self.step.errors.values():
            passed = passed | ~(error <= self.bound).to(device)  # NaN is bad, too
        bad = torch.stack((passed, ~_are_finite(results, device))).int()
        spread = Spread.of(getattr(model, "_parallel_config", None))
        _reduce(bad, spread, dist.ReduceOp.MAX)
        has_passed, is_not_finite = bad.tolist()
        if has_passed or not is_not_finite:
            return bool(has_passed)
        finite = _are_finite(inputs, device).int()
        _reduce(finite, spread, dist.ReduceOp.MIN)
        return bool(finite)


class Watch:
    """The guard's watch over one attention module; an `operator.Observer`.

    index: the module's number in the guard. handle: for `operator.attention`. turned: why it turned back, in words.
    sampled_rows: rows of heads that were compared, since it last turned. replayed: whether a CUDA graph was captured.
    """

    def __init__(self, guard: Guard, name: str, index: int):
        self.guard = guard
        self.name = name
        self.index = index
        self.level = Level.ASKED
        self.turned: list[str] = []
        self.sampled_rows = 0
        self.replayed = False
        self._counts: Counter[Asked] = Counter()  # calls, by what they ask for
        self.handle = handle_of(self)

    def __setstate__(self, state: dict[str, Any]) -> None:  # a copy is another observer
        self.__dict__.update(state)
        self.handle = handle_of(self)

    @property
    def relative_error(self) -> float | None:
        """The estimate over all rows that were sampled since the module last turned; None for none. It waits."""
        if not self.sampled_rows:
            return None
        return float(
            relative(torch.stack([sums[self.index].cpu() for sums in self.guard.sums.values()]).sum(0))
        )

    @torch.no_grad()
    def attention(self, call: Call, asked: Asked, attend: Callable[[str], Result]) -> Result:
        """Runs a call as the module's level says, and samples some."""
        self.guard.step.has_run = True
        if self.guard.step.is_careful:
            return self._carefully(call, asked, attend)
        level = self.level
        result = self._run(level, call, asked.policy, attend)
        count, every = self._counts[asked], interval(call.q.shape[2])
        self._counts[asked] += 1
        if level is Level.STOCK or (count and (count + self.index) % every):
            return result
        if is_capturing(call.q.device):
            self.replayed = True
            return result
        part, out, rows = self._sample(call, result.out, count)
        sums = squares(part, out, rows)
        self._tensor(self.guard.sums, sums.device, len(self.guard.watches), 2)[self.index] += sums
        largest = self._tensor(self.guard.step.errors, sums.device)
        torch.maximum(largest, relative(sums), out=largest)  # NaN stays
        self.sampled_rows += part.q.shape[0] * part.q.shape[1] * len(rows)
        return result

    def _sample(self, call: Call, out: torch.Tensor, count: int) -> tuple[Call, torch.Tensor, range]:
        """The sampled heads of a call and of its output, and the rows, which are the same from one sample to the next.

        count: how many calls there were before.
        """
        queries, kv_heads = call.q.shape[2], call.k.shape[1]
        number, group = (count + self.index) // interval(queries), call.q.shape[1] // kv_heads
        heads = sampled_heads(kv_heads, number)
        own, asking = (slice(heads.start * each, heads.stop * each) for each in (1, group))
        part = replace(call, q=call.q[:, asking], k=call.k[:, own], v=call.v[:, own])
        return part, out[:, asking], sampled_rows(queries, number)

    def _tensor(
        self, tensors: dict[torch.device, torch.Tensor], device: torch.device, *shape: int
    ) -> torch.Tensor:
        """The one of these tensors that is on the device; zeros, which are added to them, if there is none yet."""
        if device not in tensors:
            with torch.inference_mode(False):  # what is made in that mode can't be changed outside of it
                tensors[device] = kept(lambda: torch.zeros(shape, device=device), device)
        return tensors[device]

    def _run(self, level: Level, call: Call, policy: str, attend: Callable[[str], Result]) -> Result:
        if level is Level.STOCK:
            return _stock(call)
        return attend(policy if level is Level.ASKED else DENSE)

    def _carefully(self, call: Call, asked: Asked, attend: Callable[[str], Result]) -> Result:
        """Runs a call until its result is good; the module turns back for each that is not."""
        while True:
            level = self.level
            result = self._run(level, call, asked.policy, attend)
            fault = "" if level is Level.STOCK else self._fault(call, result.out, self._counts[asked] - 1)
            if not fault or not self._turn(level, asked, fault):
                return result

    def _fault(self, call: Call, out: torch.Tensor, count: int) -> str:
        """Tells what is wrong with a call's output, in words; empty for nothing. It waits for the device."""
        error = relative(squares(*self._sample(call, out, count)))
        became_bad = _are_finite([call.q, call.k, call.v], out.device) & ~_are_finite([out], out.device)
        error, became_bad = torch.stack((error, became_bad.float())).tolist()
        if became_bad or not math.isfinite(error):
            return "its output was not finite"
        bound = self.guard.bound
        return f"a call's relative error of {error:.3g} passed {bound:g}" if error > bound else ""

    def _turn(self, level: Level, asked: Asked, fault: str) -> bool:
        """Turns the module back after a fault at this level; tells whether that was possible."""
        if self.level is not level:
            return True  # another thread did
        was_high = level is Level.HIGH or asked.policy == DENSE
        if was_high and asked.return_lse:
            self._say(f"with every tile HIGH {fault}; over a ring there is no stock attention to turn to")
            return False
        self.level = Level.STOCK if was_high else Level.HIGH
        ran = "every tile HIGH" if was_high else f"{asked.high}|{asked.low} {asked.policy}"
        runs = "stock attention" if was_high else "every tile is HIGH"
        self._say(f"with {ran} {fault}: {runs} from now on")
        for sums in self.guard.sums.values():
            sums[self.index] = 0
        self.sampled_rows = 0
        return True

    def _say(self, words: str) -> None:
        if words not in self.turned:
            self.turned.append(words)
            logger.warning("%s: guard: %s: %s", self.guard.forward.model, self.name, words)


def _stock(call: Call) -> Result:
    """Stock attention's result, laid out as the operator's."""
    dtype, mask = call.q.dtype, call.key_mask
    q = changed_q(call).to(dtype) if call.changes_q else call.q
    k = changed_k(call).to(dtype) if call.changes_k else call.k
    out = functional.scaled_dot_product_attention(
        q, k, call.v.to(dtype), None if mask is None else mask[:, None, None], is_causal=call.is_causal,
        scale=call.scale, enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    out = out.transpose(1, 2).contiguous().transpose(1, 2)
    return Result(out, out.new_empty(0, dtype=torch.float32), out.new_empty(0, dtype=torch.int32))


def _floats(value: Any) -> Iterator[torch.Tensor]:
    """The float tensors in what a model takes or gives."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _floats(each)


def _reduce(flags: torch.Tensor, spread: Spread | None, operation: Any) -> None:
    """Lets the GPUs that share the model's attention agree on flags."""
    if spread is not None:
        dist.all_reduce(flags, operation, group=spread.context._flattened_mesh.get_group())


def _are_finite(tensors: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Tells whether all numbers are finite: bool `[]` on the device."""
    finite = torch.ones((), dtype=torch.bool, device=device)
    for x in tensors:
        finite = finite & x.isfinite().all().to(device)
    return finite
