"""Sharing of a quantised input by the layers that read one tensor."""

from collections.abc import Callable

from torch import Tensor


class SharedInput:
    """The quantised input of several layers, such as q, k and v: the first one that is called makes it.

    torch.compile merges neither registered operators nor sums of equal inputs, so the layers must share by themselves.
    Traced, this leaves one quantisation in the graph. layers: how many read each input; the last one lets go of it. If
    one of them is not called, the input is held until the next one comes.
    """

    def __init__(self, layers: int):
        self._layers = layers
        self._left = 0
        self._x: Tensor | None = None
        self._inputs: tuple[Tensor, ...] = ()

    def get(self, x: Tensor, quantise: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """x as `quantise` (`linear.quantise_input`, but for x) makes it, unless another layer had it made."""
        if self._x is not x:
            self._x, self._inputs, self._left = x, quantise(x), self._layers
        inputs = self._inputs
        self._left -= 1
        if self._left == 0:
            self._x, self._inputs = None, ()
        return inputs
