"""Launches that are recorded once, and made again on other tensors with a fraction of the host's work.

Triton looks at each of some sixty arguments at every launch, and encodes every tensor descriptor anew. A call of the
same shapes, strides and alignment launches the same kernels with the same numbers; only the addresses differ.
"""

import copy
import inspect
from collections.abc import Callable, Sequence
from threading import Lock
from types import CellType, FunctionType
from typing import Any, NamedTuple

import torch
from triton.runtime import driver

from dma_diffusers.kernels.device.launch import Launcher, Run, run
from dma_diffusers.kernels.device.memory import kept

_ALIGNMENT = 256  # bytes: TMA wants 16, and no cache line holds two tensors
_MOST_ADDRESSES = 4096  # for which a descriptor is kept encoded


class Recorder(Launcher):
    """Launches at once, and remembers the launches for a `Recording`.

    inputs: tensors that differ from call to call, with the same shapes, strides and alignment.
    """

    def __init__(self, inputs: Sequence[torch.Tensor]):
        super().__init__()
        self.inputs = inputs
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

    constants: tensors that stay what and where they are, such as a plan's. bytes: how much memory the kernels write.
    Raises ValueError where a launch reads a tensor of which the recorder does not know, or two inputs are one.
    """

    def __init__(self, recorder: Recorder, constants: Sequence[torch.Tensor]):
        self._constants = constants  # kept alive
        self._places: dict[int, int | _Place] = {x.data_ptr(): x.data_ptr() for x in constants}
        for number, x in enumerate(recorder.inputs):
            place = _Place(number, 0)
            if self._places.setdefault(x.data_ptr(), place) is not place:
                raise ValueError("two tensors of the call begin at one address")
        self.bytes = self._place_all(recorder.workspaces, len(recorder.inputs))
        self._counted = self._place_all(recorder.counted, len(recorder.inputs) + 1)
        self._lock = Lock()
        self._counters: dict[int, torch.Tensor] = {}  # by stream: the calls of one stream follow each other
        self._launches = [
            _Launch(compiled, grid, list(map(self._placed, values)))
            for compiled, grid, values in recorder.launches
        ]

    def launch(self, device: torch.device, addresses: tuple[int, ...]) -> None:
        """Launch on the device's current stream. addresses: of the inputs."""
        stream = driver.active.get_current_stream(device.index)
        workspace = torch.empty(self.bytes, dtype=torch.uint8, device=device)
        counters = self._counters.get(stream)
        if torch.cuda.is_current_stream_capturing():  # a graph may run beside its stream, and has its own
            counters = torch.zeros(self._counted, dtype=torch.uint8, device=device)
        elif counters is None:
            counters = kept(lambda: torch.zeros(self._counted, dtype=torch.uint8, device=device), device)
            self._counters[stream] = counters
        addresses = (*addresses, workspace.data_ptr(), counters.data_ptr())
        with self._lock:  # two threads' launches on one stream would count in the same counters
            for launch in self._launches:
                launch(stream, addresses)

    def _place_all(self, tensors: list[torch.Tensor], base: int) -> int:
        """Place tensors one behind the other; returns the bytes that they take."""
        end = 0
        for x in tensors:
            self._places[x.data_ptr()] = _Place(base, end)
            end += -(-x.numel() * x.element_size() // _ALIGNMENT) * _ALIGNMENT
        return end

    def _placed(self, value: Any) -> Any:
        """An argument with its place, or the address of a constant, in place of a tensor."""
        if isinstance(value, torch.Tensor):
            if value.data_ptr() not in self._places:
                raise ValueError(f"a launch reads a tensor {list(value.shape)} that was not recorded")
            return self._places[value.data_ptr()]
        return (
            _Descriptor(_with_base(value, None), self._placed(value.base))
            if hasattr(value, "base")
            else value
        )


class _Launch:
    """One kernel's launch, whose arguments Triton has expanded once; only addresses are still to be filled in."""

    def __init__(self, compiled: Any, grid: tuple[int, int, int], values: list[Any]):
        self._given = [*grid, 0, compiled.function, compiled.packed_metadata, None, None, None, *values]
        self._run = compiled.run
        self._launch, self._expand = _beneath(compiled.run) or (compiled.run, None)
        self._encoded: list[dict[int, Any]] = [{} for value in values if isinstance(value, _Descriptor)]
        self._head: list[Any] = []  # arguments before a list of all others, from Triton 3.7 on
        self._template: list[Any] = []

    def __call__(self, stream: int, addresses: tuple[int, ...]) -> None:
        if not self._template:
            self._make_template(addresses)
        arguments = self._template.copy()
        for position, place in self._places:
            arguments[position] = addresses[place.base] + place.offset
        for position, place, encoded in self._descriptors:
            descriptor = encoded.get(_address(place, addresses))
            arguments[position] = self._encode(addresses)[position] if descriptor is None else descriptor
        if self._head:
            self._launch(*self._head[:3], stream, *self._head[4:], arguments)
        else:
            arguments[3] = stream
            self._launch(*arguments)

    def _make_template(self, addresses: tuple[int, ...]) -> None:
        """Find where addresses and descriptors stand among the arguments of the function that launches."""
        head, arguments = self._arguments(addresses)
        positions = _positions(arguments)
        if len(positions) != len(
            self._encoded
        ):  # Triton arranges descriptors in a way that is not known here
            self._expand = None
            head, arguments = self._arguments(addresses)
            positions = _positions(arguments)
        places = [value.place for value in self._given if isinstance(value, _Descriptor)]
        self._descriptors = list(zip(positions, places, self._encoded, strict=True))
        self._places = [(n, value) for n, value in enumerate(arguments) if isinstance(value, _Place)]
        self._head, self._template = head, arguments

    def _encode(self, addresses: tuple[int, ...]) -> list[Any]:
        """Encode and keep the descriptors at these addresses; returns all arguments."""
        _, arguments = self._arguments(addresses)
        for position, place, encoded in self._descriptors:
            if len(encoded) >= _MOST_ADDRESSES:
                encoded.clear()
            encoded[_address(place, addresses)] = arguments[position]
        return arguments

    def _arguments(self, addresses: tuple[int, ...]) -> tuple[list[Any], list[Any]]:
        """Arguments with descriptors at these addresses, and places still in place of other addresses.

        Returns the arguments that stand before a list of others, if Triton has such a list, and the others.
        """
        given = tuple(
            value.moved(_address(value.place, addresses)) if isinstance(value, _Descriptor) else value
            for value in self._given
        )
        if self._expand is None:
            self._launch = self._run
            return [], list(given)
        expanded = self._expand(*given)
        if type(expanded[-1]) in (list, tuple):
            return list(expanded[:-1]), list(expanded[-1])
        return [], list(expanded)


class _Place(NamedTuple):
    """An address: `offset` bytes behind that of the tensor with the number `base`."""

    base: int
    offset: int


class _Descriptor(NamedTuple):
    """A tensor descriptor, without its tensor, which lies at a place, or at an address that stays."""

    descriptor: Any
    place: _Place | int

    def moved(self, address: int) -> Any:
        """The descriptor of a tensor at `address`."""
        return _with_base(self.descriptor, _Tensor(address))


class _Tensor:
    """Stands for a tensor of which Triton wants to know the address alone."""

    def __init__(self, address: int):
        self._address = address

    def data_ptr(self) -> int:
        return self._address


def _with_base(descriptor: Any, base: Any) -> Any:
    """A copy of a descriptor; with None for its tensor, whose memory is not kept then: a CUDA graph may own it."""
    changed = copy.copy(descriptor)
    object.__setattr__(changed, "base", base)
    return changed


def _address(place: _Place | int, addresses: tuple[int, ...]) -> int:
    return addresses[place.base] + place.offset if isinstance(place, _Place) else place


def _positions(arguments: list[Any]) -> list[int]:
    """Positions of descriptors, encoded or not: all that is neither number, word, place nor packed metadata."""
    plain = (int, float, str, tuple, type(None), _Place)
    return [n for n, value in enumerate(arguments) if not isinstance(value, plain)]


def _beneath(launcher: Any) -> tuple[Run, Callable[..., tuple]] | None:
    """The C function in which Triton's launcher ends, and a function that gives its arguments; None if not found.

    Triton encodes every tensor descriptor anew at each launch, which takes most of the launch's time. Triton 3.6 to
    3.9 arrange this in one way (`CudaLauncher.launch` and `wrap_handle_tensordesc`).
    """
    launch = getattr(launcher, "launch", None)
    scratch = [getattr(launcher, f"{name}_scratch_size", 1) for name in ("global", "profile")]
    if launch is None or any(scratch):  # memory that is allocated at each launch
        return None
    taken: list[tuple] = []

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

    def expand(*arguments: Any) -> tuple:
        observed(*arguments)
        return taken.pop()

    return launch, expand
