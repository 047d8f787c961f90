"""The search finds the cheapest options of every module and head whose errors, summed, keep to a budget."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_SLIGHTEST, _STEPS = (
    1e-12,
    100,
)  # they are the least price of a cost, and how often the logarithms' range is halved


class Selection(NamedTuple):
    """The search found this choice.

    level: number of the table. option: of each module, int64 `[modules]`. window: of each head, int64 `[modules,
    heads]`. ways: of each item beside attention, int64 `[items]`.
    """

    level: int
    option: np.ndarray
    window: np.ndarray
    ways: np.ndarray


class Search:
    """A search knows every option's errors and costs, which add up.

    tables: one (errors, costs) for each level, of which the whole model takes one: float64 `[options, windows, modules,
    heads]`. A module takes one option for all its heads, each head takes its window. items: what else takes one of its
    ways, whatever the level: (errors, costs) of each, float64 `[ways]`. All should be near 1 in sum, or less.
    """

    def __init__(
        self,
        tables: Sequence[tuple[np.ndarray, np.ndarray]],
        items: Sequence[tuple[np.ndarray, np.ndarray]] = (),
    ):
        self.tables, self.items = tables, items
        self.most, self.least = self.error(self._best(1 / _SLIGHTEST)), self.error(self._best(_SLIGHTEST))

    def within(self, budget: float) -> Selection:
        """Return the cheapest of the choices that are best at some price of cost and err by no more than `budget`.

        Where even the most precise of all errs by more, it is returned. A smaller budget never finds a cheaper choice,
        nor one that errs more.
        """
        low, high = _SLIGHTEST, 1 / _SLIGHTEST
        if self.error(self._best(high)) <= budget:
            return self._best(high)
        for _ in range(_STEPS):
            price = (low * high) ** 0.5
            low, high = (price, high) if self.error(self._best(price)) <= budget else (low, price)
        return self._best(low)

    def error(self, found: Selection) -> float:
        """Return the sum of a choice's errors."""
        return self._sum(found, 0)

    def cost(self, found: Selection) -> float:
        """Return the sum of a choice's costs."""
        return self._sum(found, 1)

    def _sum(self, found: Selection, which: int) -> float:
        modules, heads = np.ogrid[: found.window.shape[0], : found.window.shape[1]]
        of_attention = self.tables[found.level][which][found.option[:, None], found.window, modules, heads]
        of_items = sum(item[which][way] for item, way in zip(self.items, found.ways, strict=True))
        return float(of_attention.sum() + of_items)

    def _best(self, price: float) -> Selection:
        """Minimise error + price · cost (Lagrange): heads, then modules, then the level and items, each by itself."""
        ways = np.array([(errors + price * costs).argmin() for errors, costs in self.items], dtype=np.int64)
        choices = []
        for level, (errors, costs) in enumerate(self.tables):
            value = errors + price * costs
            of_modules = value.min(1).sum(-1)
            option = of_modules.argmin(0)
            window = value.argmin(1)[option, np.arange(len(option))]
            choices.append((of_modules.min(0).sum(), level, Selection(level, option, window, ways)))
        return min(choices, key=lambda choice: choice[:2])[2]
