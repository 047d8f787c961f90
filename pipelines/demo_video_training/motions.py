"""Define how an object moves through a clip."""

from collections.abc import Callable

import numpy as np

FRAMES = 33
"""The number of frames of a clip; every latent frame but the first stands for four of them."""

_SIDE = 0.58  # an object that keeps its size has this side, in canvas heights


def _pose(t: np.ndarray, x=0.0, y=0.0, side=_SIDE, turn=0.0) -> np.ndarray:
    return np.stack([np.broadcast_to(value, t.shape) for value in (x, y, side, turn)], axis=-1)


_MOTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "standing still": _pose,
    "moving left": lambda t: _pose(t, x=0.44 - 0.88 * t),
    "moving right": lambda t: _pose(t, x=0.88 * t - 0.44),
    "moving up": lambda t: _pose(t, y=0.22 - 0.44 * t),
    "moving down": lambda t: _pose(t, y=0.44 * t - 0.22),
    "growing": lambda t: _pose(t, side=0.3 + 0.6 * t),
    "shrinking": lambda t: _pose(t, side=0.9 - 0.6 * t),
    "spinning": lambda t: _pose(t, turn=t),
    "bouncing": lambda t: _pose(t, y=0.2 - 0.42 * np.abs(np.sin(2 * np.pi * t))),
    "rocking": lambda t: _pose(t, turn=np.sin(4 * np.pi * t) / 10),
}

MOTIONS = tuple(_MOTIONS)
"""The motions that the model can draw, in the prompt's words."""


def poses() -> np.ndarray:
    """Return the object's pose for every motion and frame, float64 ``[motions, FRAMES, 4]``.

    A pose is (x, y, side, turn). Here (x, y) is the object's centre relative to that of the canvas, with y downwards.
    It and the side are in canvas heights; the turn is a number of clockwise turns.
    """
    t = np.linspace(0, 1, FRAMES)
    return np.stack([motion(t) for motion in _MOTIONS.values()])
