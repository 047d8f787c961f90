"""Launches that are recorded once, and made again on other tensors with a fraction of the host's work.

Triton looks at each of some sixty arguments at every launch, and encodes every tensor descriptor anew. A call of the
same shapes, strides and alignment launches the same kernels with the same numbers; only the addresses differ.
"""

import copy
import inspect
from collections.abc import Sequence
from types import CellType, FunctionType
from typing import Any, NamedTuple

import torch
from triton.runtime import driver

from dma_diffusers.kernels.device.launch import Launcher, Run, run

_ALIGNMENT = 256  # bytes: TMA wants 16, and no cache line holds two tensors
_MOST_BOUND = 256  # sets of addresses for which a recording keeps its arguments


class Recorder(Launcher):
    """Launches at once, and remembers the launches for a `Recording`.

    inputs: tensors that differ from call to call, with the same shapes, strides and alignment.
    constants: tensors that stay what and where they are, such as a plan's.
    """

    def __init__(self, inputs: Sequence[torch.Tensor], constants: Sequence[torch.Tensor | None]):
        super().__init__()
        self.inputs = inputs
        self.constants = [x for x in constants if x is not None]
        self.workspaces: list[torch.Tensor] = []
        self.counted: list[torch.Tensor] = []
        self.launches: list[tuple[Any, tuple[int, ...], list[Any]]] = []

    def __call__(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        compiled = run(kernel, grid, *arguments, **options)
        named = dict(zip(kernel.arg_names, arguments, strict=False)) | options
        self.launches.append((compiled, (*grid, 1, 1)[:3], [named[name] for name in kernel.arg_names]))

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        self.workspaces.append(super().empty(shape, dtype, device))
        return self.workspaces[-1]

    def counters(self, shape: Sequence[int], device: torch.device) -> torch.Tensor:
        self.counted.append(super().counters(shape, device))
        return self.counted[-1]


class Recording:
    """The launches of one call, which can be launched again on other tensors.

    bytes: how much memory the kernels write.
    Raises ValueError where a launch reads a tensor of which the recorder does not know, or two inputs are one.
    """

    def __init__(self, recorder: Recorder):
        self._constants = recorder.constants  # kept alive
        self._places = {x.data_ptr(): _Place(None, x.data_ptr()) for x in recorder.constants}
        for number, x in enumerate(recorder.inputs):
            place = _Place(number, 0)
            if self._places.setdefault(x.data_ptr(), place) is not place:
                raise ValueError("two tensors of the call begin at one address")
        self.bytes = self._place_all(recorder.workspaces, len(recorder.inputs))
        self._counted = self._place_all(recorder.counted, len(recorder.inputs) + 1)
        self._counters: dict[int, torch.Tensor] = {}  # by stream: the calls of one stream follow each other
        self._launches = [
            (compiled, grid, list(map(self._placed, values))) for compiled, grid, values in recorder.launches
        ]
        self._bound: dict[tuple, list[tuple[Run, tuple]]] = {}

    def _place_all(self, tensors: list[torch.Tensor], base: int) -> int:
        """Place tensors one behind the other; returns the bytes that they take."""
        end = 0
        for x in tensors:
            self._places[x.data_ptr()] = _Place(base, end)
            end += -(-x.numel() * x.element_size() // _ALIGNMENT) * _ALIGNMENT
        return end

    def launch(self, device: torch.device, addresses: tuple[int, ...]) -> None:
        """Launch on the device's current stream. addresses: of the inputs."""
        stream = driver.active.get_current_stream(device.index)
        workspace = torch.empty(self.bytes, dtype=torch.uint8, device=device)
        counters = self._counters.get(stream)
        if counters is None or torch.cuda.is_current_stream_capturing():
            counters = torch.zeros(self._counted, dtype=torch.uint8, device=device)
            if (
                not torch.cuda.is_current_stream_capturing()
            ):  # a graph may run beside its stream, and has its own
                self._counters[stream] = counters
        addresses = (*addresses, workspace.data_ptr(), counters.data_ptr())
        key = (stream, addresses)
        launches = self._bound.get(key)
        if launches is None:
            launches = [self._bind(*launch, stream, addresses) for launch in self._launches]
            if len(self._bound) >= _MOST_BOUND:
                self._bound.clear()
            self._bound[key] = launches
        for launch, arguments in launches:
            launch(*arguments)

    def _placed(self, value: Any) -> Any:
        """An argument with its place in place of its address."""
        if isinstance(value, torch.Tensor):
            if value.data_ptr() not in self._places:
                raise ValueError(f"a launch reads a tensor {list(value.shape)} that was not recorded")
            return self._places[value.data_ptr()]
        return _Descriptor(value, self._placed(value.base)) if hasattr(value, "base") else value

    def _bind(
        self, compiled: Any, grid: tuple[int, int, int], values: list[Any], stream: int, addresses: tuple
    ) -> tuple[Run, tuple]:
        """Finds the function that launches a kernel, and its arguments with these addresses."""
        arguments = [
            value.at(addresses) if isinstance(value, _Place | _Descriptor) else value for value in values
        ]
        whole = (*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments)
        return _beneath(compiled.run, whole) or (compiled.run, whole)


class _Place(NamedTuple):
    """An address: `offset` bytes behind that of the tensor `base`; None for a base of 0."""

    base: int | None
    offset: int

    def at(self, addresses: tuple) -> int:
        return self.offset if self.base is None else addresses[self.base] + self.offset


class _Descriptor(NamedTuple):
    """A tensor descriptor whose tensor lies at a place."""

    descriptor: Any
    place: _Place

    def at(self, addresses: tuple) -> Any:
        moved = copy.copy(self.descriptor)
        object.__setattr__(moved, "base", _Address(self.place.at(addresses)))
        return moved


class _Address(NamedTuple):
    """Stands for a tensor of which Triton wants to know the address alone."""

    address: int

    def data_ptr(self) -> int:
        return self.address


def _beneath(launcher: Any, arguments: tuple) -> tuple[Run, tuple] | None:
    """The C function that Triton's launcher ends in, and what it would be given; None if that can't be found.

    Triton encodes every tensor descriptor anew at each launch, which takes most of the launch's time. This is
    arranged in one way in Triton 3.6 to 3.9 (`CudaLauncher.launch` and `wrap_handle_tensordesc`).
    """
    launch, taken = getattr(launcher, "launch", None), []
    if (
        launch is None
        or getattr(launcher, "global_scratch_size", 1)
        or getattr(launcher, "profile_scratch_size", 1)
    ):
        return None  # memory that is allocated at each launch

    def take(*given: Any) -> None:
        taken.append(given)

    observed = copy.copy(launcher)
    if isinstance(launch, FunctionType):
        names = launch.__code__.co_freevars
        if "launcher" not in names:
            return None
        cells = [
            CellType(take) if name == "launcher" else cell
            for name, cell in zip(names, launch.__closure__, strict=True)
        ]
        observed.launch = FunctionType(launch.__code__, launch.__globals__, closure=tuple(cells))
        launch = inspect.getclosurevars(launch).nonlocals["launcher"]
    else:
        observed.launch = take
    observed(*arguments)
    return launch, taken[0]
