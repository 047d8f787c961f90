"""The attention call as one registered torch operator: plan, quantise, attend.

The operator takes tensors, numbers and names; the plan (the precision map on the call's device) is made once
for each length and kept, so `torch.compile` sees one node and a new length compiles nothing.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from itertools import count
from typing import Any, NamedTuple, Protocol
from weakref import WeakValueDictionary

import torch

from dma_diffusers.kernels import lowerings, plan
from dma_diffusers.kernels.attention import reference
from dma_diffusers.kernels.backward import reference as differentiated
from dma_diffusers.kernels.backward.int8 import check_products
from dma_diffusers.kernels.call import Call, Memory, Norms, Rope
from dma_diffusers.kernels.checks import check, check_call
from dma_diffusers.kernels.device.memory import kept
from dma_diffusers.kernels.lowerings import Choice
from dma_diffusers.kernels.plan_cache import PlanCache, Size
from dma_diffusers.kernels.precision import Precisions
from dma_diffusers.kernels.tiling.policies import Dense, Diagonal, Policy, parse
from dma_diffusers.kernels.tiling.precision_map import Class

DIAGONAL = str(Diagonal())
DENSE = str(Dense(Class.HIGH))


def choose(device: torch.device, head_dim: int, high: str, low: str, lowering: str = "auto") -> Choice:
    """The lowering that calls on `device` take; raises ValueError as `lowerings.choose` does."""
    return lowerings.choose(lowerings.architecture(device), head_dim, high, low, lowering)


class Result(NamedTuple):
    """The result of an attention call.

    out: `[B, H, Sq, D]` in q's dtype. lse: the natural log-sum-exp, float32 `[B, H, Sq]`; empty unless wanted.
    inexact_rows: int32 `[1]` on the device, how many rows of q and k are not what their format says because e4m3
        and one power of two can't hold them; empty for lowerings other than `faithful`.
    """

    out: torch.Tensor
    lse: torch.Tensor
    inexact_rows: torch.Tensor


class Asked(NamedTuple):
    """A call asks for a policy and two precisions, all in words; return_lse is as in `attention`."""

    policy: str
    high: str
    low: str
    return_lse: bool


class Attend(Protocol):
    """It runs a call by the words of a policy, else as it asks, and hands its routing a memory."""

    def __call__(self, policy: str, memory: Memory | None = None) -> Result: ...


class Observer(Protocol):
    """It is handed the calls of one place in a model, and may run them otherwise than they ask for.

    It also sees calls inside of compiled graphs, but for those that a CUDA graph replays.
    """

    def attention(self, call: Call, asked: Asked, attend: Attend) -> Result:
        """Gives a call's result."""
        ...


_OBSERVERS: WeakValueDictionary[int, Observer] = WeakValueDictionary()
_NUMBERS = count()


def handle_of(observer: Observer) -> torch.Tensor:
    """The handle by which `attention` finds an observer, as long as there is one: int64 `[]` on the CPU."""
    number = next(_NUMBERS)
    _OBSERVERS[number] = observer
    with torch.inference_mode(False):
        return torch.tensor(number, device="cpu")


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    *,
    q_rope: Rope | None = None,
    k_rope: Rope | None = None,
    norms: Norms | None = None,
    high: str = "mxfp8",
    low: str = "mxfp4",
    policy: Policy | str | Sequence[str] = DIAGONAL,
    which: int = 0,
    grid: Sequence[int] = (),
    text_start: int = 0,
    text_stop: int = 0,
    parts: int = 1,
    masks_text: bool = False,
    mapped: bool = True,
    lowering: str = "auto",
    rotation: str = "none",
    smooth_k: bool = True,
    smooth_v: bool = True,
    backward: str = "bf16",
    return_lse: bool = False,
    observer: torch.Tensor | None = None,
) -> Result:
    """Mixed-precision attention: a policy says which tiles are HIGH, which LOW, and which are skipped.

    q: `[B, H, Sq, D]`; k and v: `[B, Hkv, Sk, D]`; bf16, fp16 or fp32. D ≤ 256, Hkv divides H. Strides are free, but no
        two elements share memory.
    key_mask: bool `[B, Sk]`, True where a key is seen; a query that sees none gives zeros and −inf.
    scale: the factor of the scores, more than 0; D^-½ by default.
    norms: the RMSNorm that q and k go through first.
    q_rope, k_rope: cosines and sines, each float32 `[S, D/2]`, by which channels 2i and 2i+1 are turned next.
    high, low: the precisions of the classes: the format of Q·K, `"int8"`, or the formats of Q·K and P·V, `"int8/bf16"`.
    policy: one of `tiling.policies`, or its words; DMA by default (arXiv 2604.03950). Or the words of several, of which
        the one with the number `which` counts: graphs of calls that differ in nothing else are then the same.
    grid: the grid on which the tokens that aren't text lie, see `Layout`. Policies on the grid need it, and Sq = Sk.
        Their tiles are boxes: the kernels gather tokens as they read them, and scatter what they write.
    text_start, text_stop: the text tokens, which are HIGH as keys and as queries. If there are as many queries as keys
        other than text, the queries are those tokens; in a causal call, query i stands at key i all the same.
    parts: the sequence is this many equal parts, one after the other, with text at this range of each (`Layout`).
    masks_text: key_mask hides none but text tokens, so that other tiles need not look at it.
    mapped: False makes every tile HIGH.
    lowering: the name of one, or "auto" for the first that can run the call.
    rotation: of the channels of q and k, one of `formats.ROTATIONS`, before any format but bf16 stores them: outliers
        in a few channels are spread over a block, and scores stay as they are. After a slash that of v, which it has
        where a class stores it in 8 bits; the output is turned back.
    smooth_k: k loses its mean before any format but bf16 stores it, which changes no probability. smooth_v: v loses its
        mean before it is stored in 8 bits, and the output gets it back.
    backward: the format of the backward's products: "bf16", or "int8", in which classes whose Q·K is in INT8 then have
        six of seven (SageBwd, arXiv 2603.02170). Gradients are the less exact for it; the forward stays as it is.
    observer: the handle of one that is handed the call, unless it wants gradients (`handle_of`); None for none.

    Gradients flow to q, k and v, also from the log-sum-exp, but not to tables. Policies with a threshold and calls with
    norms have no backward: an error says so.
    The call waits for no device, but the first one with new lengths makes a plan: a CUDA graph can't capture that one.
    Raises ValueError for arguments that it can't take, before anything is launched.
    """
    if not k.device == v.device == q.device or (key_mask is not None and key_mask.device != q.device):
        devices = ", ".join(str(x.device) for x in (q, k, v, key_mask) if x is not None)
        raise ValueError(f"q, k, v and key_mask must be on one device, got {devices}")
    for name, rope in (("q", q_rope), ("k", k_rope)):
        if rope is not None and len(rope) != 2:
            raise ValueError(f"{name}_rope must be cosines and sines, got {len(rope)} tables")
    policies = [str(policy)] if isinstance(policy, Policy | str) else policy
    operator, handle = (_OPERATOR, ()) if observer is None else (_OBSERVED_OPERATOR, (observer,))
    wants_gradients = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if wants_gradients:  # of which the backward needs the log-sum-exp
        operator, handle = _DIFFERENTIABLE_OPERATOR, ()
    out, lse, inexact_rows = operator(
        *handle, q, k, v, key_mask, *(q_rope or (None, None)), *(k_rope or (None, None)),
        *((None,) * 4 if norms is None else norms.tensors),
        *((0.0, 0, False) if norms is None else (norms.eps, norms.first, norms.rounds_twice)),
        q.shape[-1] ** -0.5 if scale is None else scale, is_causal, high, low, policies, which, grid,
        text_start, text_stop, parts, masks_text, mapped, lowering, rotation, smooth_k, smooth_v, backward,
        return_lse or wants_gradients,
    )  # fmt: skip
    return Result(out, lse if return_lse else lse.new_empty(0), inexact_rows)


_PLANS = PlanCache()


def _attention(
    q, k, v, key_mask, q_cos, q_sin, k_cos, k_sin, q_weight, q_first_weight, k_weight, k_first_weight, eps, first,
    rounds_twice, scale, is_causal, high, low, policies, which, grid,
    text_start, text_stop, parts, masks_text, mapped, lowering, rotation, smooth_k, smooth_v, backward,
    return_lse, memory=None,
):  # fmt: skip
    """The operator on every device. A call that is like one before, but for its numbers, finds everything prepared.

    memory: a `Memory`, which is no argument of the registered operator; None for none.
    """
    if q.ndim != 4 or k.ndim != 4:
        check(q, k, v, key_mask)
    policy = policies[which]
    grid = tuple(grid or ())  # AOTInductor hands an empty one over as None
    size = _PLANS.size(q.shape[2], k.shape[2], (text_start, text_stop), grid, q.device, parts)
    weights = (q_weight, q_first_weight, k_weight, k_first_weight)
    tensors = (q, k, v, key_mask, q_cos, q_sin, k_cos, k_sin, *weights)
    key = (
        *[x if x is None else (x.shape, x.stride(), x.dtype, x.get_device()) for x in tensors],
        eps, first, rounds_twice, scale, is_causal, high, low, policy, masks_text, mapped, lowering, rotation,
        smooth_k, smooth_v, return_lse, q is k, k is v, q is v, q_cos is k_cos, q_sin is k_sin,
        None if memory is None else memory.is_read, *(() if q_weight is None else _sharing(weights)),
    )  # fmt: skip
    norms = _norms(weights, eps, first, rounds_twice)
    ropes = _rope(q_cos, q_sin), _rope(k_cos, k_sin)
    call = Call(q, k, v, key_mask, scale, is_causal, *ropes, norms, rotation, smooth_k, smooth_v, memory)
    attend = size.prepared.get(key)
    if attend is None:
        check_call(call)
        chosen = choose(q.device, q.shape[3], high, low, lowering).lowering
        planned = _planned(size, call, policy, mapped, masks_text)
        attend = _prepare(call, planned, Precisions.parse(high, low), chosen, return_lse)
        size.prepared[key] = attend
    if memory is not None and memory.high is None:
        _make_room(memory, call, _planned(size, call, policy, mapped, masks_text))
    out, lse, inexact_rows = attend(call)
    nothing = _nothing(q.device)
    return out, nothing[0] if lse is None else lse, nothing[1] if inexact_rows is None else inexact_rows


def _planned(size: Size, call: Call, policy: str, mapped: bool, masks_text: bool) -> plan.Plan:
    """The plan of a call. Raises ValueError for a policy for another number of heads, and as `Size.plan` does."""
    asked, heads = parse(policy) if mapped else Dense(Class.HIGH), call.q.shape[1]
    if asked.heads not in (None, heads):
        raise ValueError(f"{policy} is for {asked.heads} heads, but q has {heads}")
    masks_text = masks_text and call.key_mask is not None and size.layout.text_length > 0
    return size.plan(asked, call.is_causal, masks_text)


def _make_room(memory: Memory, call: Call, planned: plan.Plan) -> None:
    """Makes the tensors of a memory, which outlive the call; none where content decides of nothing."""
    if planned.routing is not None:
        (batch, heads), make_room = call.q.shape[:2], planned.routing.make_room
        with torch.inference_mode(False):  # what is made in that mode can't be changed outside of it
            kept(lambda: make_room(memory, batch, heads), call.q.device)


def _sharing(tensors: Sequence[torch.Tensor | None]) -> list[int]:
    """For each tensor, the number of the first one that it is."""
    return [next(n for n, other in enumerate(tensors) if other is x) for x in tensors]


def _rope(cos: torch.Tensor | None, sin: torch.Tensor | None) -> Rope | None:
    return None if cos is None or sin is None else (cos, sin)


def _norms(
    weights: tuple[torch.Tensor | None, ...], eps: float, first: int, rounds_twice: bool
) -> Norms | None:
    """The norms with these weights, in the order of `Norms.tensors`; None if they are None."""
    q, q_first, k, k_first = weights
    return None if q is None or k is None else Norms(q, k, eps, first, q_first, k_first, rounds_twice)


def _observed_attention(handle: torch.Tensor, *arguments):
    """The operator, whose call is handed to an observer."""
    asked = dict(zip(_PARAMETERS, arguments, strict=True))

    def attend(policy: str, memory: Memory | None = None) -> Result:
        given = {} if memory is None else {"memory": memory}
        return Result(*_attention(**asked | given | {"policies": [policy], "which": 0, "mapped": True}))

    call = _call_of(asked)
    policy = asked["policies"][asked["which"]] if asked["mapped"] else DENSE
    wanted = Asked(policy, asked["high"], asked["low"], asked["return_lse"])
    return _OBSERVERS[int(handle)].attention(call, wanted, attend)


def _call_of(asked: dict[str, Any]) -> Call:
    """The call of the operator's arguments, by name."""
    norms = _norms(
        tuple(asked[name] for name in ("q_weight", "q_first_weight", "k_weight", "k_first_weight")),
        asked["eps"], asked["first"], asked["rounds_twice"],
    )  # fmt: skip
    q_rope, k_rope = _rope(asked["q_cos"], asked["q_sin"]), _rope(asked["k_cos"], asked["k_sin"])
    return Call(
        asked["q"], asked["k"], asked["v"], asked["key_mask"], asked["scale"], asked["is_causal"], q_rope, k_rope,
        norms, asked["rotation"], asked["smooth_k"], asked["smooth_v"],
    )  # fmt: skip


def _differentiable_attention(*arguments):
    """The operator, for a call whose gradients are wanted. Raises ValueError for one that has no backward."""
    asked = dict(zip(_PARAMETERS, arguments, strict=True))
    policy = parse(asked["policies"][asked["which"]]) if asked["mapped"] else Dense(Class.HIGH)
    check_products(asked["backward"], asked["high"], asked["low"], asked["rotation"])
    if refusal := differentiated.why_not(policy, asked["q_weight"] is not None):
        raise ValueError(refusal)
    return _attention(*arguments)


def _attention_backward(out_gradient, lse_gradient, out, lse, *arguments):
    """The gradients of q, k and v, by the kernels or, where the forward was the reference, by the reference."""
    asked = dict(zip(_PARAMETERS, arguments, strict=True))
    call, q, k = _call_of(asked), asked["q"], asked["k"]
    text, grid = (asked["text_start"], asked["text_stop"]), tuple(asked["grid"] or ())
    size = _PLANS.size(q.shape[2], k.shape[2], text, grid, q.device, asked["parts"])
    planned = _planned(size, call, asked["policies"][asked["which"]], asked["mapped"], asked["masks_text"])
    precisions = Precisions.parse(asked["high"], asked["low"])
    chosen = choose(q.device, q.shape[3], asked["high"], asked["low"], asked["lowering"]).lowering
    with torch.autocast(q.device.type, enabled=False):
        if chosen == "reference":
            found = differentiated.gradients(
                call,
                planned,
                precisions,
                lse,
                out_gradient,
                lse_gradient,
                out=out,
                products=asked["backward"],
            )
            return tuple(found)
        from dma_diffusers.kernels.backward import launch

        found = launch.gradients(
            call, planned, precisions, out, lse, out_gradient, lse_gradient,
            products=asked["backward"], lowering=chosen,
        )  # fmt: skip
        return tuple(found)


def _keep(ctx: Any, inputs: tuple, output: tuple) -> None:
    """Keeps what the backward reads: the arguments, tensors first, and the results but for the inexact rows."""
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:_TENSORS], *output[:2])
    ctx.numbers = inputs[_TENSORS:]


def _backward(
    ctx: Any, out_gradient: torch.Tensor | None, lse_gradient: torch.Tensor | None, _: Any
) -> tuple:
    *tensors, out, lse = ctx.saved_tensors
    if out_gradient is None:
        out_gradient = torch.zeros_like(out)
    gradients = _BACKWARD_OPERATOR(out_gradient, lse_gradient, out, lse, *tensors, *ctx.numbers)
    return *gradients, *(None,) * (len(_PARAMETERS) - len(gradients))


_PARAMETERS = tuple(inspect.signature(_attention).parameters)[:-1]  # the last is not the operator's
_TENSORS = 12  # so many of them are tensors, and come first


def _prepare(
    call: Call, planned: plan.Plan, precisions: Precisions, lowering: str, return_lse: bool
) -> Callable[[Call], tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]]:
    """Makes a function that runs calls of this kind.

    It returns the output, the log-sum-exp and the inexact rows; None for those that there are not.
    """
    if lowering != "reference":
        from dma_diffusers.kernels.attention.launch import Prepared

        return Prepared(call, planned, precisions, lowering, return_lse).attention

    def attend(call: Call) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        with torch.autocast(call.q.device.type, enabled=False):  # it would round the scores
            out, lse = reference.attention(call, planned, precisions)
        return _empty_output(call.q).copy_(out), lse if return_lse else None, None

    return attend


@cache
def _nothing(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Empty tensors for a log-sum-exp that is not wanted, and for rows that are not counted."""
    with torch.inference_mode(False):
        return torch.empty(0, device=device), torch.empty(0, dtype=torch.int32, device=device)


def _fake(*arguments):
    asked = dict(zip(_PARAMETERS, arguments, strict=True))
    q = asked["q"]
    lse = q.new_empty(q.shape[:3] if asked["return_lse"] else (0,), dtype=torch.float32)
    chosen = choose(q.device, q.shape[3], asked["high"], asked["low"], asked["lowering"]).lowering
    counts = chosen == "faithful"
    return _empty_output(q), lse, q.new_empty(1 if counts else 0, dtype=torch.int32)


def _empty_output(q: torch.Tensor) -> torch.Tensor:
    """`[B, H, S, D]`, laid out as `[B, S, H, D]`, which is what models go on with."""
    batch, heads, length, head_dim = q.shape
    return q.new_empty(batch, length, heads, head_dim).transpose(1, 2)


def _observed_fake(handle: torch.Tensor, *arguments):
    return _fake(*arguments)


def _backward_fake(out_gradient, lse_gradient, out, lse, q, k, v, *others):
    return _empty_output(q), _empty_output(k), _empty_output(v)


# `torch.library.custom_op` takes more of the host's time at every call than all that is launched.
_LIBRARY = torch.library.Library("dma_diffusers", "DEF")
_SCHEMA = (
    "Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? q_cos, Tensor? q_sin, Tensor? k_cos, "
    "Tensor? k_sin, Tensor? q_weight, Tensor? q_first_weight, Tensor? k_weight, Tensor? k_first_weight, float eps, "
    "SymInt first, bool rounds_twice, float scale, bool is_causal, str high, str low, str[] policies, SymInt which, "
    "SymInt[] grid, SymInt text_start, SymInt text_stop, SymInt parts, bool masks_text, bool mapped, str lowering, "
    "str rotation, bool smooth_k, bool smooth_v, str backward, bool return_lse) -> (Tensor, Tensor, Tensor)"
)
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_LIBRARY.define(f"attention({_SCHEMA}", tags=_TAGS)
# A CUDA graph would replay an observer's launches, and not ask it.
_LIBRARY.define(f"observed_attention(Tensor observer, {_SCHEMA}", tags=(*_TAGS, torch.Tag.cudagraph_unsafe))
_LIBRARY.define(f"differentiable_attention({_SCHEMA}", tags=_TAGS)
_LIBRARY.define(
    "attention_backward(Tensor out_gradient, Tensor? lse_gradient, Tensor out, Tensor lse, "
    f"{_SCHEMA.partition(') ->')[0]}) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_LIBRARY.impl("attention", _attention, "CompositeExplicitAutograd")
_LIBRARY.impl("observed_attention", _observed_attention, "CompositeExplicitAutograd")
_LIBRARY.impl("differentiable_attention", _differentiable_attention, "CompositeExplicitAutograd")
_LIBRARY.impl("attention_backward", _attention_backward, "CompositeExplicitAutograd")
torch.library.register_fake("dma_diffusers::attention", _fake, lib=_LIBRARY)
torch.library.register_fake("dma_diffusers::observed_attention", _observed_fake, lib=_LIBRARY)
torch.library.register_fake("dma_diffusers::differentiable_attention", _fake, lib=_LIBRARY)
torch.library.register_fake("dma_diffusers::attention_backward", _backward_fake, lib=_LIBRARY)
torch.library.register_autograd(
    "dma_diffusers::differentiable_attention", _backward, setup_context=_keep, lib=_LIBRARY
)
_OPERATOR = torch.ops.dma_diffusers.attention.default
_DIFFERENTIABLE_OPERATOR = torch.ops.dma_diffusers.differentiable_attention.default
_BACKWARD_OPERATOR = torch.ops.dma_diffusers.attention_backward.default
_OBSERVED_OPERATOR = torch.ops.dma_diffusers.observed_attention.default
