"""The forward context: facts about a model's running forward call that all of its attention modules need."""

import inspect
import logging
import threading
from itertools import count
from typing import Any, Protocol

import torch
from torch.utils.hooks import RemovableHandle

from dma_diffusers.checkpoints import carry
from dma_diffusers.config import DMAConfig
from dma_diffusers.families import Family
from dma_diffusers.internals import FluxPosEmbed, is_exporting
from dma_diffusers.kernels.plan import is_capturing
from dma_diffusers.memory import UNTOLD, Branch, Drawings
from dma_diffusers.parallel import splits_text
from dma_diffusers.stages import Stages

logger = logging.getLogger("dma_diffusers")

UNKNOWN_NOISE = "a call did not tell its noise level: it ran as those of the highest levels"
DIGITS = 4099
"""The base in which a module's policies are numbered, a digit for each stage. No length is likely to be its power."""
_NUMBERS = count()


class Listener(Protocol):
    """An attention module's interception, as far as the forward context needs to know it."""

    def notes(self, grid: tuple[int, ...]) -> list[str]: ...


class ForwardCall:
    """Facts about one forward call; each thread has one of its own.

    is_running: whether the model's own call has begun and not ended. stage, kind: the numbers of the stage of its noise
    level, and of that stage's kind (`Stages`). trains: whether a backward pass will follow, perhaps through
    checkpoints. pairs_angles: whether the model's tables of RoPE have each angle twice, for two neighbouring channels.
    branch: where the call belongs among those of its drawing; None where nobody asks, or it is not known.
    """

    def __init__(self) -> None:
        self.is_running = False
        self.trains = False
        self.pairs_angles = False
        self.drawings = Drawings()
        self.branch: Branch | None = None
        self.enter(0, 0)
        # Empty tensors hold lengths: torch.compile would take integers for constants, and recompile.
        self.text: torch.Tensor | None = None
        self.grid: torch.Tensor | None = None

    def enter(self, stage: int, kind: int) -> None:
        """Enters the stage of this number and kind; the length of `digit` tells it to graphs that hold for several."""
        self.stage, self.kind = stage, kind
        self.digit = torch.empty(DIGITS ** (stage + 1), 0, device="cpu")


class _OfThread(threading.local):
    """A call for each thread. torch.compile follows what changes in the call, but not in a `threading.local`."""

    def __init__(self) -> None:
        self.call = ForwardCall()

    def __reduce__(self):  # a copy of the model runs no call
        return type(self), ()


class ForwardContext:
    """The text length, the grid and the noise level of a model's forward call, read by a forward pre-hook.

    config: what was asked for the model as a whole.
    stages: what its modules run at each noise level; None for a single stage.
    wants_grid: whether a policy needs to know what the tokens lie on; the family must know how to find it.
    remembers: whether a policy does.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        family: Family,
        config: DMAConfig,
        stages: Stages | None = None,
        wants_grid: bool = False,
        remembers: bool = False,
    ):
        self.family = family
        self.config = config
        self.stages = stages
        self.wants_grid = wants_grid
        self.remembers = remembers
        self.notes = [stages.note] if stages and stages.note else []
        self.parameters = tuple(inspect.signature(type(model).forward).parameters)[1:]
        self.model = type(model).__name__
        self.splits_text = splits_text(model)  # over several GPUs
        self.number = next(_NUMBERS)  # of this application of DMA
        self.announced = False
        self.warned = False
        self.checked: set[tuple[int, ...]] = set()  # grids
        self.listeners: list[Listener] = []
        self.policies: list[str] = []  # the words of the modules' policies, each once
        self._of_thread = _OfThread()

    @property
    def call(self) -> ForwardCall:
        """The call that runs in this thread, or that ran last."""
        return self._of_thread.call

    @property
    def text_length(self) -> int | None:
        """The number of text tokens that the model was given; None if it was given no text."""
        text = self.call.text
        return None if text is None else text.shape[0]

    @property
    def grid(self) -> tuple[int, ...]:
        """The sides of the grid that the other tokens lie on; () if nobody needs it, or the call does not tell."""
        grid = self.call.grid
        return () if grid is None else tuple(grid.shape[:-1])

    def watch(self, model: torch.nn.Module) -> tuple[RemovableHandle, RemovableHandle]:
        """Registers the hooks that begin and end the model's calls."""
        reads_level = self.remembers or (self.stages and self.stages.above)
        reads = reads_level or (self.wants_grid and self.family.grid_on_device)
        begin = self.begin_on_device if reads else self.begin
        return (
            model.register_forward_pre_hook(begin, with_kwargs=True),
            model.register_forward_hook(self.end, always_call=True),
        )

    def begin(self, model: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Reads the length of the text, and the grid if a policy or the family needs it; a forward pre-hook."""
        named, call = self._named(args, kwargs), self.call
        tokens = self.family.text_tokens(model, named)
        call.text = None if tokens is None else torch.empty(tokens, 0)
        if self.wants_grid or self.family.pads_grid:
            find = self.family.grid if self.wants_grid and self.family.grid else self._find_grid
            grid = find(model, named)
            call.grid = torch.empty(*grid, 0) if grid else None
        if not torch.compiler.is_compiling():
            self._check(self.grid)
        call.trains = torch.is_grad_enabled() and (
            model.training or bool(getattr(model, "gradient_checkpointing", False))
        )
        if call.trains:
            carry(model, self)
        call.pairs_angles = type(getattr(model, "pos_embed", None)) is FluxPosEmbed
        call.is_running = True

    @torch.compiler.disable  # reading would break a graph; a compiled model's hooks run before its own
    def begin_on_device(self, model: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Does what `begin` does, and finds the stage and the branch of the call; a forward pre-hook."""
        self.begin(model, args, kwargs)
        stages = self.stages if self.stages and self.stages.above else None
        if stages is None and not self.remembers:
            return
        level = self.noise_level(args, kwargs)
        if stages is None and (is_exporting() or (level is not None and is_capturing(level.device))):
            self.call.branch = None  # a graph would replay what was remembered for good
            return
        sigma = None if level is None else float(level)
        if sigma is None:
            untold = (UNKNOWN_NOISE, stages is not None), (UNTOLD, self.remembers)
            self.notes += [note for note, is_so in untold if is_so and note not in self.notes]
        if stages is not None:
            stage = stages.number(sigma)
            self.call.enter(stage, stages.kinds[stage])
        if self.remembers:
            named = self._named(args, kwargs)
            latents = named.get(self.parameters[0])
            self.call.branch = None if sigma is None else self.call.drawings.enter(named, latents, sigma)

    def end(self, model: torch.nn.Module, args: tuple, output: Any) -> None:
        """Ends the call, also when the model raises; a forward hook."""
        self.call.is_running = False

    def find_grid(self, model: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[int, ...]:
        """The sides of the grid that a forward call's tokens lie on; () if that is not known."""
        return self._find_grid(model, self._named(args, kwargs))

    def noise_level(self, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor | None:
        """The highest sigma (0 to 1) of a forward call's batch, on its device; None if it is not known."""
        timestep = self._named(args, kwargs).get(self.family.timestep)
        return None if timestep is None else self.family.noise_level(timestep)

    def _find_grid(self, model: torch.nn.Module, call: dict[str, Any]) -> tuple[int, ...]:
        try:
            return self.family.grid(model, call) if self.family.grid else ()
        except ValueError:
            return ()

    def _check(self, grid: tuple[int, ...]) -> None:
        """Logs what policies change for a grid that is new, () for none.

        Raises ValueError for one that they can't have.
        """
        if grid not in self.checked:
            notes = dict.fromkeys(note for listener in self.listeners for note in listener.notes(grid))
            for note in notes:
                logger.warning("%s: %s", self.model, note)
            self.checked.add(grid)

    def _named(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        return dict(zip(self.parameters, args, strict=False)) | kwargs
