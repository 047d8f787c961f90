"""Memory: the pairs of tiles that a module found important in one step of a drawing serve the next steps too.

It is for policies with `by=memory`. Pairs are kept for each text with which the model is called in a step, such as
prompt and negative prompt, for each of several calls with one text, for each call of a module in a step, such as those
with a ring's chunks of keys, and for each thread. They are forgotten where the noise level rises, or stays with other
latents, as in another drawing, and where the shapes or the policy change. So two drawings that take turns in one thread
share no pairs unless they share the tensor of their text, but pairs age by the steps of both. Where a model doesn't
tell the noise level, every call finds its pairs anew.
"""

import math
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from dma_diffusers.kernels.call import Call, Memory
from dma_diffusers.kernels.operator import Asked, Attend, Observer, Result, handle_of
from dma_diffusers.kernels.plan import is_capturing
from dma_diffusers.kernels.tiling.policies import parse

EVERY, FARTHEST = 6, 0.25
"""Pairs serve so many steps, that of their choice among them, while the noise level falls by this much at most."""
MOST_TEXTS, MOST_BRANCHES, MOST_CALLS = 4, 4, 16
"""So many texts of a thread, calls of a model with one text in a step, and calls of a module in one of these are told
apart."""
UNTOLD = "a call did not tell its noise level: by=memory found the important tiles anew, as by=rows does"
_TEXTS = ("encoder_hidden_states", "encoder_hidden_states_t5", "text_bth", "cap_feats")


@dataclass(eq=False)
class Kept:
    """The pairs of one module in one branch.

    key: the policy and the shapes that they are for. step, sigma: of the call that chose them; None before that.
    used: the last step in which they were chosen or read.
    """

    key: tuple
    memory: Memory = field(default_factory=Memory)
    step: int | None = None
    sigma: float = math.inf
    used: int | None = None


@dataclass(eq=False)
class Branch:
    """The calls of a model that follow each other through the steps of a drawing.

    step, sigma: the number and the noise level of the step that runs. kept: of each module, for its first call in a
    step, the second, and so on.
    """

    step: int = 0
    sigma: float = math.inf
    kept: dict["ModuleMemory", list[Kept]] = field(default_factory=dict)


def _reference(x: torch.Tensor | None) -> Callable[[], torch.Tensor | None]:
    return _nothing if x is None else weakref.ref(x)


def _nothing() -> None:
    return None


def _tensor(x: Any) -> torch.Tensor | None:
    """The tensor itself, or the first one of a list of them; None for anything else."""
    if isinstance(x, list | tuple) and x:
        x = x[0]
    return x if isinstance(x, torch.Tensor) else None


class _Drawing:
    """The branches of a drawing that have one text."""

    def __init__(self, text: torch.Tensor | None):
        self.text = _reference(text)
        self.branches: list[Branch] = []
        self.latents = _reference(None)
        self.sigma, self.calls = -math.inf, 0

    def enter(self, step: int, sigma: float, latents: torch.Tensor | None) -> Branch:
        """The branch of a call at this noise level."""
        is_same_step = sigma == self.sigma and latents is not None and self.latents() is latents
        if not is_same_step:
            self.calls = 0
        if (sigma >= self.sigma and not is_same_step) or self.calls == MOST_BRANCHES:
            self.branches, self.calls = [], 0
        self.sigma, self.latents = sigma, _reference(latents)
        if self.calls == len(self.branches):
            self.branches.append(Branch())
        branch = self.branches[self.calls]
        self.calls += 1
        branch.step, branch.sigma = step, sigma
        return branch


class Drawings:
    """The drawings of one thread with one model."""

    def __init__(self) -> None:
        self._drawings: OrderedDict[int, _Drawing] = OrderedDict()  # by the identity of their text
        # Steps are changes of the noise level, so that pairs age also where a text is left out.
        self._step, self._sigma = 0, math.nan

    def enter(self, named: Mapping[str, Any], latents: Any, sigma: float) -> Branch:
        """The branch of a model's call with these arguments, which have the text among them, and these latents."""
        text = _tensor(next((named[name] for name in _TEXTS if named.get(name) is not None), None))
        for number, drawing in list(self._drawings.items()):
            if number != id(None) and drawing.text() is None:
                del self._drawings[number]
        drawing = self._drawings.setdefault(id(text), _Drawing(text))
        self._drawings.move_to_end(id(text))
        if len(self._drawings) > MOST_TEXTS:
            self._drawings.popitem(last=False)
        if sigma != self._sigma:
            self._step, self._sigma = self._step + 1, sigma
        return drawing.enter(self._step, sigma, _tensor(latents))


class _Forward(Protocol):
    """A model's forward context, whose call has a `branch`."""

    @property
    def call(self) -> Any: ...


class ModuleMemory:
    """The memory of one attention module, which is handed its calls; an `operator.Observer`.

    inner: another observer, which runs the calls; None for none. chosen, read: so many calls found their pairs, and
    read those of an earlier step.
    """

    def __init__(self, forward: _Forward, inner: Observer | None = None):
        self.forward, self.inner = forward, inner
        self.chosen = self.read = 0
        self.handle = handle_of(self)

    def __setstate__(self, state: dict[str, Any]) -> None:  # a copy is another observer
        self.__dict__.update(state)
        self.handle = handle_of(self)

    def __str__(self) -> str:
        if not self.chosen and not self.read:
            return ""
        return f"importance was found in {self.chosen:,} calls, and remembered in {self.read:,}"

    def attention(self, call: Call, asked: Asked, attend: Attend) -> Result:
        """Runs a call, with the pairs that are kept for it, if there are any."""
        branch = self.forward.call.branch
        # A CUDA graph would replay either choice for good.
        remembers = parse(asked.policy).remembers
        can_keep = remembers and branch is not None and not is_capturing(call.q.device)
        kept = self._kept(branch, call, asked) if can_keep else None

        def run(policy: str, memory: Memory | None = None) -> Result:
            if kept is None or policy != asked.policy:
                self.chosen += remembers and policy == asked.policy
                return attend(policy)
            kept.memory.is_read = is_read = self._is_fresh(kept, branch)
            result = attend(policy, kept.memory)
            self.read += is_read
            if not is_read:
                self.chosen += 1
                kept.step, kept.sigma = branch.step, branch.sigma
            return result

        return run(asked.policy) if self.inner is None else self.inner.attention(call, asked, run)

    def _kept(self, branch: Branch, call: Call, asked: Asked) -> Kept | None:
        """The pairs for such calls in a branch; None where the module was called too often in this step.

        Calls of a step are told apart by their order: where one is left out, the next ones take its pairs.
        """
        key = asked.policy, call.q.shape, call.k.shape, call.q.device
        of_calls = branch.kept.setdefault(self, [])
        number = sum(kept.used == branch.step for kept in of_calls)
        if number == MOST_CALLS:
            return None
        if number == len(of_calls) or of_calls[number].key != key:
            of_calls[number : number + 1] = [Kept(key)]
        of_calls[number].used = branch.step
        return of_calls[number]

    def _is_fresh(self, kept: Kept, branch: Branch) -> bool:
        """Tells whether a choice was made, in a step that is not too long ago."""
        return (
            kept.step is not None
            and branch.step - kept.step < EVERY
            and kept.sigma - branch.sigma <= FARTHEST
        )
