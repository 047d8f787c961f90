"""The forward context: facts about a model's running forward call that all of its attention modules need."""

import inspect
import logging
from collections.abc import Callable
from typing import Any, Protocol

import torch

from dma_diffusers.families import Family
from dma_diffusers.parallel import splits_text

logger = logging.getLogger("dma_diffusers")


class Listener(Protocol):
    """An attention module's interception, as far as the forward context needs to know it."""

    dense: bool
    mapped: bool

    def notes(self, grid: tuple[int, ...]) -> list[str]: ...


class ForwardContext:
    """The text length, the grid and the noise level of a model's forward call, read by a forward pre-hook.

    dense_above_sigma: steps with a higher noise level run with every tile HIGH; None for no such step.
    wants_grid: whether a policy needs to know what the tokens lie on; the family must know how to find it.
    note: where dense steps and layers come from; empty if there are none.
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
        self.splits_text = splits_text(model)  # over several GPUs
        self.announced = False
        # Empty tensors hold lengths: torch.compile would take integers for constants, and recompile.
        self._text: torch.Tensor | None = None
        self._grid: torch.Tensor | None = None
        self.checked: set[tuple[int, ...]] = set()  # grids
        self.listeners: list[Listener] = []

    @property
    def text_length(self) -> int | None:
        """The number of text tokens that the model was given; None if it was given no text."""
        return None if self._text is None else self._text.shape[0]

    @property
    def grid(self) -> tuple[int, ...]:
        """The sides of the grid that the other tokens lie on; () if nobody needs it, or the call does not tell."""
        return () if self._grid is None else tuple(self._grid.shape[:-1])

    @property
    def hook(self) -> Callable[..., None]:
        """The forward pre-hook that reads what the policies need."""
        reads = (self.wants_grid and self.family.grid_on_device) or self.dense_above_sigma is not None
        return self.observe_on_device if reads else self.observe

    def observe(self, model: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Reads the length of the text, and the grid if a policy or the family needs it; a forward pre-hook."""
        call = self._named(args, kwargs)
        text = call.get("encoder_hidden_states")
        self._text = torch.empty(text.shape[1], 0) if isinstance(text, torch.Tensor) else None
        if self.wants_grid or self.family.pads_grid:
            find = self.family.grid if self.wants_grid and self.family.grid else self._find_grid
            grid = find(model, call)
            self._grid = torch.empty(*grid, 0) if grid else None
            if not torch.compiler.is_compiling():
                self._check(grid)

    @torch.compiler.disable  # reading would break a graph; a compiled model's hooks run before its own
    def observe_on_device(self, model: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Does what `observe` does, and makes a step dense whose noise level asks for it; a forward pre-hook."""
        self.observe(model, args, kwargs)
        if self.dense_above_sigma is not None:
            sigma = self.noise_level(args, kwargs)
            dense = sigma is not None and bool(sigma > self.dense_above_sigma)
            for listener in self.listeners:
                listener.mapped = not (dense or listener.dense)

    def find_grid(self, model: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[int, ...]:
        """The sides of the grid that a forward call's tokens lie on; () if that is not known."""
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
            notes = dict.fromkeys(note for listener in self.listeners for note in listener.notes(grid))
            for note in notes:
                logger.warning("%s: %s", self.model, note)
            self.checked.add(grid)

    def _named(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        return dict(zip(self.parameters, args, strict=False)) | kwargs
