"""`bench pipeline` measures whole steps of transformers at true size: stock, torchao's linears, and ours."""

import gc
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from dma_diffusers import report
from dma_diffusers.errors import first_line
from dma_diffusers.eval.bench import result, step_time
from dma_diffusers.eval.bench.backends import BACKENDS, Backend, LargestCall, fastest_backend
from dma_diffusers.eval.bench.bound import Gpu, current_gpu
from dma_diffusers.eval.bench.breakdown import best, compared
from dma_diffusers.eval.bench.memory import CallMemory
from dma_diffusers.eval.bench.models import Workload, shortened
from dma_diffusers.eval.bench.step_time import COMPILED, EAGER, GRAPH, MODES, Step, forward
from dma_diffusers.eval.bench.timing import require_gpu
from dma_diffusers.eval.bench.ways import OURS, STOCK, Asked, Way, default_configs, ways
from dma_diffusers.progress import OnStep

NOTE = (
    "Models that are named have random weights and inputs: these are speeds, and quality is unknown; what is "
    "calibrated is calibrated on the step's own inputs. A step is one forward call, and steps follow each other "
    "without a pause. Compiled: compile_repeated_blocks(fullgraph=True). Graph: the compiled step as one CUDA graph, "
    "which takes the host almost nothing. Parts are sums of the times of kernels, by PyTorch's profiler, in a step of "
    "their own; host is the rest of the step's time."
)
_PACKAGES = ("dma_diffusers", "torch", "diffusers", *(["torchao"] if find_spec("torchao") else []))
_TURNS = 3


class Settings(NamedTuple):
    """The settings say what is measured of each model, and how long.

    configs: ours; None for `default_configs`. only: patterns of the names of the ways that are wanted, all if
    empty. modes: of `MODES`; empty for the default: eager for stock, compiled for all, and for pictures graphs for all.
    seconds: for the timed steps of each way and mode.
    """

    configs: Sequence[Asked] | None = None
    only: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()
    seconds: float = 2.0
    seed: int = 0

    def modes_of(self, way: Way, workload: Workload) -> list[str]:
        """Return the modes in which a way is timed, in the order of `MODES`."""
        default = [COMPILED] if workload.is_video else [COMPILED, GRAPH]
        chosen = self.modes or (default if way.kind != STOCK else [EAGER, *default])
        return [mode for mode in MODES if mode in chosen]

    @property
    def recorded(self) -> dict[str, Any]:
        """Return the settings as a result records them."""
        configs = [[str(each) for each in asked] for asked in self.configs or ()]
        return {"seed": self.seed, "seconds": self.seconds, "configs": configs, "modes": list(self.modes)}


def bench_pipeline(
    workloads: Mapping[str, Workload],
    settings: Settings,
    output: Path | None = None,
    command: str = "",
    on_step: OnStep = lambda name, done, total: None,
) -> dict[str, Any]:
    """Time steps of each model, and return the result that `result.collect` describes, of what `measure` gives.

    output: the file that the result is written to, model by model. command: how this was started, for the record.
    Raises ValueError without a GPU, for an unknown mode, for `only` that fits nothing, and where the file there has
    other settings.
    """
    if strange := [mode for mode in settings.modes if mode not in MODES]:
        raise ValueError(f"unknown mode {strange[0]!r}: choose from {', '.join(MODES)}")
    require_gpu()
    gpu = current_gpu()
    only = f", only {', '.join(settings.only)}" if settings.only else ""
    measures = {
        f"{name}, {workload.size}{only}": partial(
            measure, name, workload, settings, gpu, torch.device("cuda"), on_step
        )
        for name, workload in workloads.items()
    }
    recorded = {"note": NOTE} | settings.recorded | result.environment(gpu, _PACKAGES)
    return result.collect(measures, recorded, output, command)


def measure(
    name: str,
    workload: Workload,
    settings: Settings,
    gpu: Gpu,
    device: torch.device,
    on_step: OnStep = lambda name, done, total: None,
) -> dict[str, Any]:
    """Measure one model: `{"model", "size", "grid", "parameters", "backends", "stock", …, "entries"}`.

    Every way has a model of its own. The first ones stay in memory as graphs while the next fit beside them; in the end
    these graphs are timed once more, in turns, and these times count. An entry is one of `_Bench.entries`, with what
    `breakdown.compared` adds. best_stock, best_ours: the fastest entries of each kind, and best_over_stock the speed of
    the second in units of the first's.
    """
    model = workload.build(device, settings.seed)
    inputs = workload.inputs(model, settings.seed)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    configs = settings.configs
    if configs is None:
        configs = default_configs(workload, model, gpu.architecture)
    chosen = ways(configs, settings.only)
    with shortened(model), LargestCall() as largest:
        forward(model, inputs)
    shape = largest.shape
    known = [backend for backend in BACKENDS if backend.sdpa is not None or largest.dispatched]
    del model
    backends, backend = fastest_backend(shape, gpu, settings.seed, known)
    bench = _Bench(workload, inputs, device, backend, settings)
    entries: list[dict[str, Any]] = []
    for index, way in enumerate(chosen):
        on_step(name, index, len(chosen))
        entries += bench.entries(way)
    bench.in_turns(entries)
    on_step(name, len(chosen), len(chosen))
    entries = compared(entries, chosen)
    stock, ours = best(entries, STOCK), best(entries, OURS)
    return {
        "model": workload.kind, "size": workload.size, "grid": list(workload.grid), "parameters": parameters,
        "attention": list(shape.size), "backends": backends, "stock": backend.peer.name,
        "entries": entries, "best_stock": stock, "best_ours": ours,
        "best_over_stock": stock and ours and stock["step_ms"] / ours["step_ms"],
    }  # fmt: skip


class _Bench:
    """A bench times ways to compute one step. It holds the graphs that it captured, and with them their models' memory.

    backend: runs attention where it isn't ours.
    """

    def __init__(
        self,
        workload: Workload,
        inputs: dict[str, Any],
        device: torch.device,
        backend: Backend,
        settings: Settings,
    ):
        self._workload, self._inputs, self._device = workload, inputs, device
        self._backend, self._settings = backend, settings
        self._held: dict[str, Step] = {}
        self._reference: torch.Tensor | None = None
        self._most_bytes = 0  # that a way took so far

    def entries(self, way: Way) -> list[dict[str, Any]]:
        """Time a way: return an entry for each mode, or the reason under `absent`.

        An entry has the way's name and kind, its mode, the values of `step_time.timed`, `weights_bytes` (what is
        allocated for the model), `peak_bytes` (the most that is allocated in steps, the weights included), the receipt,
        and `relative_l2`, how far its result is from the first entry's, None where it isn't finite. If attention is
        ours, it also says what memory a call of it takes.
        """
        _clear()
        while self._held and _room() < 1.2 * self._most_bytes:
            self._held.popitem()  # the last one, so that stock stays
            _clear()
        before = torch.cuda.memory_allocated()
        modes = self._settings.modes_of(way, self._workload)
        found = []
        try:
            model = self._workload.build(self._device, self._settings.seed)
            way.put_on(model, self._inputs)
            _clear()
            weights = torch.cuda.memory_allocated() - before
            memory = _call_memory(model, self._inputs) if way.attends else {}
        except Exception as error:  # a peer may fail in whatever way it likes
            torch.cuda.synchronize()  # raises, and ends the run, if the device is lost to all
            return [_absent(way, mode, error) for mode in modes]
        about = {"weights_bytes": weights} | memory
        for mode in modes:
            try:
                found.append(_entry(way, mode) | self._timed(way, mode, model) | about)
            except Exception as error:
                torch.cuda.synchronize()
                found.append(_absent(way, mode, error))
                continue
            found[-1]["receipt"] = str(report(model)).splitlines()
            found[-1]["peak_bytes"] = torch.cuda.max_memory_allocated() - before
            self._most_bytes = max(self._most_bytes, found[-1]["peak_bytes"])
        return found

    def _timed(self, way: Way, mode: str, model: torch.nn.Module) -> dict[str, Any]:
        torch.cuda.reset_peak_memory_stats()
        with nullcontext() if way.attends else self._backend.running():
            step = step_time.prepare(model, self._inputs, mode)
            values, out = step_time.timed(step, self._settings.seconds)
        if mode == GRAPH:
            self._held[way.name] = step
        if self._reference is None:
            self._reference = out.clone()
        return values | {"relative_l2": self._error(out)}

    def _error(self, out: torch.Tensor) -> float | None:
        """Return the relative L2 of a step's result to the first entry's; None where it isn't finite."""
        out, exact = out.double(), self._reference.double()
        error = ((out - exact).norm() / exact.norm()).item()
        return error if math.isfinite(error) else None

    def in_turns(self, entries: Sequence[dict[str, Any]]) -> None:
        """Time the graphs that are still held once more, in turns; `interleaved` says so in an entry."""
        graphs = {
            entry["name"]: entry
            for entry in entries
            if entry["mode"] == GRAPH and entry["name"] in self._held and len(self._held) > 1
        }
        for entry in graphs.values():
            entry |= {"interleaved": True, "rounds_ms": []}
        for _ in range(_TURNS):
            for name, entry in graphs.items():
                step = self._held[name]
                count, _ = step_time.counts(entry["step_ms"], self._settings.seconds / _TURNS)
                step_time.wall_ms(step, 1)  # so that the clock is the one that this step leaves the GPU
                entry["rounds_ms"].append(step_time.wall_ms(step, count))
        for name, entry in graphs.items():
            entry["step_ms"] = median(entry["rounds_ms"])
            entry["relative_l2"] = self._error(self._held[name]())  # it still computes the same
        self._held.clear()


def _entry(way: Way, mode: str) -> dict[str, Any]:
    return {"name": way.name, "kind": way.kind, "mode": mode}


def _absent(way: Way, mode: str, error: Exception) -> dict[str, Any]:
    return _entry(way, mode) | {"absent": first_line(error)}


def _call_memory(model: torch.nn.Module, inputs: dict[str, Any]) -> dict[str, int | None]:
    """Return the most bytes that a call of our attention takes beside its tensors, and what `doctor` says of it."""
    with shortened(model), CallMemory().watching(model) as memory:
        forward(model, inputs)
    return {"extra_bytes": memory.extra, "said_bytes": memory.said}


def _room() -> int:
    """Return the bytes of the GPU's memory that could still be allocated."""
    free, _ = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def _clear() -> None:
    """Free what models that are gone left: their compiled code, and their memory."""
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()
