"""The search finds the cheapest options of every module, range and head whose errors, summed, keep to a budget."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_SLIGHTEST, _STEPS = (
    1e-12,
    100,
)  # they are the least price of a cost, and how often the logarithms' range is halved


class Selection(NamedTuple):
    """The search found this choice.

    formats: of each module, int64 `[modules]`. option: of each head, int64 `[modules, ranges, heads]`. ways: of each
    item beside attention, int64 `[items]`.
    """

    formats: np.ndarray
    option: np.ndarray
    ways: np.ndarray


class Search:
    """A search knows every option's errors and costs, which add up.

    errors, costs: float64 `[formats, options, modules, ranges, heads]`. A module takes formats for all its ranges of
    noise levels, and in each range options of one group, each head its own. groups: the number of options in each
    group, in their order. items: what else takes one of its ways: (errors, costs) of each, float64 `[ways]`. All should
    be near 1 in sum, or less.
    """

    def __init__(
        self,
        errors: np.ndarray,
        costs: np.ndarray,
        groups: Sequence[int],
        items: Sequence[tuple[np.ndarray, np.ndarray]] = (),
    ):
        self.tables, self.items = (errors, costs), items
        self._group_of = np.repeat(np.arange(len(groups)), groups)
        self._first = np.cumsum([0, *groups[:-1]])
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
        modules, ranges, heads = np.indices(found.option.shape, sparse=True)
        formats = found.formats[:, None, None]
        of_attention = self.tables[which][formats, found.option, modules, ranges, heads]
        of_items = sum(item[which][way] for item, way in zip(self.items, found.ways, strict=True))
        return float(of_attention.sum() + of_items)

    def _best(self, price: float) -> Selection:
        """Minimise error + price · cost (Lagrange): heads, groups, ranges, modules and items, each by itself."""
        errors, costs = self.tables
        value = errors + price * costs
        of_groups = np.minimum.reduceat(value, self._first, axis=1).sum(-1)
        formats = of_groups.min(1).sum(-1).argmin(0)
        module = np.arange(len(formats))
        group = of_groups[formats, :, module].argmin(1)
        is_open = self._group_of[:, None] == group[:, None]
        option = np.where(is_open[..., None], value[formats, :, module], np.inf).argmin(1)
        ways = np.array([(errors + price * costs).argmin() for errors, costs in self.items], dtype=np.int64)
        return Selection(formats, option, ways)
