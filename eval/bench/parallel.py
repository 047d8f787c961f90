"""`bench parallel` measures attention over several GPUs beside attention on one, in one process for each GPU.

The processes are torchrun's. Every GPU times the same calls in the same turns, and a call takes as long as on the
slowest of them.
"""

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import ContextParallelConfig, ParallelConfig
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.attention import SDPBackend, sdpa_kernel

from dma_diffusers.eval.bench import result
from dma_diffusers.eval.bench.bound import current_gpu
from dma_diffusers.eval.bench.shapes import Shape
from dma_diffusers.kernels import operator
from dma_diffusers.parallel import Spread

HOW_TO_START = "python3 -m torch.distributed.run --nproc-per-node 2 -m dma_diffusers bench parallel"
HEADER = ("attention", "on", "ms", "× on one", "× cuDNN on one", "differs from one")
CUDNN, LOW, MAPPED = "cuDNN bf16", "bf16|int8, LOW everywhere", "bf16|int8, window 128, sink 128"
_POLICIES = {LOW: "dense(everywhere=low)", MAPPED: "diagonal(window=128, sink=128)"}
ONE, ULYSSES, RING = "one GPU", "Ulysses", "ring"
EXCHANGE, WIRE, WIRE_8_BIT = "exchange", "wire, bf16", "wire, q, k and v in 8 bits"
NOTE = (
    "The exchange is all that Ulysses or the ring do beside attention: copies, communication, merging. The wire is the "
    "communication of Ulysses alone, in bf16, and with q, k and v in half the bytes: the difference is the most that "
    "sending quantised numbers could gain, without what it would cost to quantise them before."
)


@contextmanager
def processes(device_type: str = "cuda") -> Iterator[torch.device]:
    """Joins torchrun's processes; gives this one's device. Raises ValueError where there are no several processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise ValueError(f"this command runs in one process for each GPU: {HOW_TO_START}")
    device = torch.device(device_type, int(os.environ["LOCAL_RANK"]) if device_type == "cuda" else None)
    if device_type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device_type == "cuda" else "cpu:gloo"
    options = {"device_id": device} if device_type == "cuda" else {}
    dist.init_process_group(backend, timeout=timedelta(minutes=5), **options)
    try:
        yield device
        dist.barrier()  # the first process keeps the others' store
    finally:
        dist.destroy_process_group()
        # Groups that lie in cycles would have threads until the interpreter ends, which gloo's abort.
        gc.collect()


def spread_over(ring: int, ulysses: int, device: torch.device) -> Spread:
    """The spread that Diffusers would set up for a model with these degrees."""
    context = ContextParallelConfig(ring_degree=ring, ulysses_degree=ulysses)
    parallel = ParallelConfig(context_parallel_config=context)
    mesh = init_device_mesh(device.type, context.mesh_shape, mesh_dim_names=context.mesh_dim_names)
    parallel.setup(dist.get_rank(), dist.get_world_size(), device, mesh=mesh)
    found = Spread.of(parallel)
    assert found is not None
    return found


def bench_parallel(
    shape: Shape,
    device: torch.device,
    rounds: int = 3,
    calls: int = 5,
    seed: int = 0,
    lowering: str = "auto",
    command: str = "",
    on_step: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> dict[str, Any]:
    """Time attention of one shape on one GPU and over all, and the communication alone, in turns.

    rounds, calls: so many rounds, in each of which so many calls of a kind are timed; medians are returned.
    lowering: of our operator. Returns `{"command", "settings", "entries", "communication"}`; entries have `name`, `on`,
    `ms`, and of those over several GPUs `relative_l2` to the same on one. Every process returns the same.
    Raises ValueError for heads or tokens that the GPUs don't divide.
    """
    gpus = dist.get_world_size()
    if shape.heads % gpus or shape.tokens % gpus:
        raise ValueError(f"{gpus} GPUs must divide heads and tokens, got {shape.heads} and {shape.tokens}")
    generator = torch.Generator(device).manual_seed(seed)
    whole = [_random(shape, generator) for _ in range(3)]
    parts = [x.chunk(gpus, 2)[dist.get_rank()].transpose(1, 2).contiguous().transpose(1, 2) for x in whole]
    spreads = {ULYSSES: spread_over(1, gpus, device), RING: spread_over(gpus, 1, device)}
    timed: dict[tuple[str, str], Callable[[], Any]] = {(CUDNN, ONE): partial(_cudnn, *whole)}
    for name in _POLICIES:
        timed[name, ONE] = partial(operator.attention, *whole, **_asked(name, lowering))
    timed[CUDNN, ULYSSES] = partial(_over, spreads[ULYSSES], _cudnn_result, parts, _asked(LOW, lowering))
    for name in _POLICIES:
        for on, spread in spreads.items():
            timed[name, on] = partial(_over, spread, operator.attention, parts, _asked(name, lowering))
    for on, spread in spreads.items():
        timed[EXCHANGE, on] = partial(_over, spread, _nothing, parts, _asked(LOW, lowering))
    for name, of_qkv in ((WIRE, torch.bfloat16), (WIRE_8_BIT, torch.uint8)):
        sent = [torch.zeros(x.numel(), dtype=of_qkv, device=device) for x in parts]
        timed[name, ULYSSES] = partial(_exchange, [*sent, torch.zeros_like(sent[0], dtype=torch.bfloat16)])
    errors = {key: _error(timed, key) for key in timed if key[0] in (CUDNN, *_POLICIES) and key[1] != ONE}
    taken = _take_turns(timed, device, rounds, calls, on_step)
    entries = [
        {"name": name, "on": on, "ms": taken[name, on]}
        | ({"relative_l2": errors[name, on]} if (name, on) in errors else {})
        for name, on in timed
    ]
    settings = {"shape": list(shape.size), "gpus": gpus, "rounds": rounds, "calls": calls, "seed": seed}
    if device.type == "cuda":
        settings |= result.environment(current_gpu())
    share = {name: taken[EXCHANGE, ULYSSES] / taken[name, ULYSSES] for name in _POLICIES}
    gain = {
        name: (taken[WIRE, ULYSSES] - taken[WIRE_8_BIT, ULYSSES]) / taken[name, ULYSSES] for name in _POLICIES
    }
    communication = {"share_of_ulysses": share, "most_that_8_bits_gain": gain}
    return {"command": command, "settings": settings, "entries": entries, "communication": communication}


def cells(measured: dict[str, Any]) -> list[tuple[str, ...]]:
    """The lines of a table under HEADER."""
    ms = {(entry["name"], entry["on"]): entry["ms"] for entry in measured["entries"]}
    lines = []
    for entry in measured["entries"]:
        is_attention = (entry["name"], ONE) in ms
        faster = [
            f"{ms[name, ONE] / entry['ms']:.2f}" if is_attention else "" for name in (entry["name"], CUDNN)
        ]
        error = f"{entry['relative_l2']:.5f}" if "relative_l2" in entry else ""
        lines.append((entry["name"], entry["on"], f"{entry['ms']:.2f}", *faster, error))
    return lines


def _random(shape: Shape, generator: torch.Generator) -> torch.Tensor:
    """`[B, H, S, D]` in bf16, laid out as models have it, `[B, S, H, D]`; the same in every process."""
    batch, heads, tokens, head_dim = shape.size
    x = torch.randn(batch, tokens, heads, head_dim, generator=generator, device=generator.device)
    return x.bfloat16().transpose(1, 2)


def _asked(name: str, lowering: str) -> dict[str, Any]:
    return {
        "high": "bf16", "low": "int8", "policy": _POLICIES[name], "lowering": lowering, "text_start": 0, "text_stop": 0,
    }  # fmt: skip


def _cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION if q.is_cuda else SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v)


def _cudnn_result(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_) -> operator.Result:
    """cuDNN's attention in the operator's place."""
    return operator.Result(_cudnn(q, k, v), q.new_empty(0), q.new_empty(0))


def _nothing(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_) -> operator.Result:
    """No attention, in the operator's place."""
    return operator.Result(q, q.new_zeros(q.shape[:3], dtype=torch.float32), q.new_empty(0))


def _over(spread: Spread, attend: Callable, parts: list[torch.Tensor], asked: dict[str, Any]) -> torch.Tensor:
    return spread.attention(attend, *parts, None, None, **asked)


def _exchange(sent: list[torch.Tensor]) -> list[torch.Tensor]:
    """Exchanges all tensors between all GPUs, as Ulysses does, without the copies before and after."""
    received = [torch.empty_like(x) for x in sent]
    for out, x in zip(received, sent, strict=True):
        dist.all_to_all_single(out, x)
    return received


def _error(timed: dict[tuple[str, str], Callable[[], Any]], key: tuple[str, str]) -> float:
    """The relative L2 distance between the parts of all GPUs and one GPU's result, whose part is compared on each."""
    own, one = timed[key](), timed[key[0], ONE]()
    one = one.out if isinstance(one, operator.Result) else one
    expected = one.chunk(dist.get_world_size(), 2)[dist.get_rank()].float()
    squares = torch.stack([(own.float() - expected).square().sum(), expected.square().sum()])
    dist.all_reduce(squares)
    return (squares[0] / squares[1]).sqrt().item()


def _take_turns(
    timed: dict[tuple[str, str], Callable[[], Any]],
    device: torch.device,
    rounds: int,
    calls: int,
    on_step: Callable[[str, int, int], None],
) -> dict[tuple[str, str], float]:
    """The median milliseconds of each call, of which each takes as long as on the slowest GPU."""
    taken: dict[tuple[str, str], list[float]] = {key: [] for key in timed}
    for number in range(rounds):
        on_step("rounds", number, rounds)
        for key, call in timed.items():
            call()
            each = torch.tensor([_milliseconds(call, device) for _ in range(calls)], device=device)
            dist.all_reduce(each, dist.ReduceOp.MAX)
            taken[key] += each.tolist()
    on_step("rounds", rounds, rounds)
    return {key: median(ms) for key, ms in taken.items()}


def _milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    """The time of one call, which all processes begin together."""
    dist.barrier()
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - began)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)
