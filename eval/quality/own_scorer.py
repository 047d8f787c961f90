"""A scorer of the user's own is a function of a picture or clip and its prompt that gives one number."""

import importlib
import math
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

from dma_diffusers.eval.quality.scoring import Chunk

_SIDE = 224  # of the picture that a scorer is tried on


class OwnScorer:
    """This calls the function that `module:function` names, once for each picture or clip.

    The function takes uint8 frames `[F, 3, H, W]`, of which a picture has one, on the device that scores, and the
    prompt. It may have attributes: `title` for the table's column, `better` ("higher" or "lower") and `digits`. Its
    module is looked for in the working folder, too.

    Attributes:
        failures: one line for each picture or clip that it gave no number for since the list was emptied.

    Raises:
        ValueError: there is no such function, or a package or file is missing when it is tried on a grey picture; the
            message says which.
    """

    def __init__(self, name: str, device: torch.device):
        self.name, self.failures = name, list[str]()
        self.function = _function(name)
        try:
            self.function(
                torch.full((1, 3, _SIDE, _SIDE), 128, dtype=torch.uint8, device=device), "a picture"
            )
        except (ImportError, OSError) as error:
            raise ValueError(f"--scorer {name}: {_line(error)}") from error
        except Exception:  # it may want other pictures than this one
            pass
        self.column: dict[str, Any] = {
            "title": getattr(self.function, "title", name),
            "better": getattr(self.function, "better", "higher"),
            "digits": getattr(self.function, "digits", 3),
        }

    def __call__(self, chunk: Chunk) -> torch.Tensor:
        """Score a batch, `[B]` float64; a picture that the function raises on, or gives no finite number for, has ∞."""
        return torch.tensor(
            [self._score(*each) for each in zip(chunk.frames, chunk.prompts, chunk.seeds, strict=True)],
            dtype=torch.float64,
        )

    def _score(self, frames: torch.Tensor, prompt: str, seed: int) -> float:
        try:
            score = float(self.function(frames, prompt))
            if math.isfinite(score):
                return score
            reason = f"it gave {score}"
        except Exception as error:  # it is the user's code, and one picture must not end a run of hours
            reason = f"{type(error).__name__}: {_line(error)}"
        self.failures.append(f"{prompt!r}, seed {seed} ({reason})")
        return math.inf


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _function(name: str) -> Callable[[torch.Tensor, str], Any]:
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise ValueError(f"--scorer {name}: give module:function, such as aesthetic:score")
    here = os.getcwd()
    if here not in sys.path:  # a command that pip installed does not look there
        sys.path.append(here)
    try:
        found = getattr(importlib.import_module(module), function, None)
    except Exception as error:
        reason = f"{type(error).__name__}: {_line(error)}"
        raise ValueError(f"--scorer {name}: {module} cannot be imported ({reason})") from error
    if not callable(found):
        raise ValueError(f"--scorer {name}: {module} has no function {function}")
    return found
