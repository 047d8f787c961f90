"""This module plots quality over cost: one metric over measured seconds or predicted attention, and the noise floor."""

from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from dma_diffusers.eval.report.axes import is_logarithmic, is_near, say_beyond
from dma_diffusers.eval.report.columns import ran_by_reference
from dma_diffusers.eval.report.evaluation import BASELINE, CONFIGURATION, NOISE_FLOOR, noun
from dma_diffusers.eval.report.svg import FAINT, INK, label_decades, row_colours, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

# A label may stand at these places about its point, in points, the best place first.
_PLACES = [(8, 0), (-8, 0), (8, 9), (8, -9), (-8, 9), (-8, -9), (0, 12), (0, -12), (0, 22), (0, -22)]


COSTS = {
    "seconds_per_picture": "seconds per {noun}, measured",
    "predicted_cost": "attention's cost, predicted, of bf16's",
}


_NAMED = 10  # so many points have room for their names; more are numbered


class Point(NamedTuple):
    """A point is a configuration: its cost, and its figure with the bounds of the interval."""

    name: str
    cost: float
    estimate: float
    low: float
    high: float


def pareto(evaluation: dict[str, Any], metric: str | None, cost: str = "seconds_per_picture") -> str | None:
    """Plot a point with its 95 % interval for each configuration, as an <svg> element; None without points.

    cost: one of `COSTS`.
    """
    if metric is None or not _points(evaluation, metric, cost):
        return None
    width = 6.4 if len(_points(evaluation, metric, cost)) <= _NAMED else 9.6
    return svg(f"pareto-{cost}", width, 4.2, lambda figure: _draw(figure, evaluation, metric, cost))


def _points(evaluation: dict[str, Any], metric: str, cost: str) -> list[Point]:
    """Return the configurations that can be drawn: those with a finite figure and a cost.

    Rows of which no attention call ran at low precision show nothing, and the reference's seconds are not a kernel's.
    """
    points = []
    for name, row in evaluation["rows"].items():
        interval = _finite(row, metric)
        shows_nothing = row.get("ran") == 0 or (cost == "seconds_per_picture" and ran_by_reference(row))
        if row["role"] == CONFIGURATION and interval and row.get(cost) and not shows_nothing:
            points.append(Point(name, row[cost], *interval))
    return points


def _finite(row: dict[str, Any], metric: str) -> tuple[float, float, float] | None:
    """Return a row's estimate and bounds, which are the estimate where they are infinite; None for no finite figure."""
    figure = row["summary"].get(metric)
    if not figure or figure["estimate"] is None:
        return None
    low, high = (figure.get(bound) for bound in ("low", "high"))
    estimate = figure["estimate"]
    return estimate, estimate if low is None else low, estimate if high is None else high


def _draw(figure: "Figure", evaluation: dict[str, Any], metric: str, cost: str) -> None:
    axes, colours = figure.subplots(), row_colours(evaluation["rows"])
    points, about = _points(evaluation, metric, cost), evaluation["metrics"][metric]
    values, costs = [value for point in points for value in point[2:]], [point.cost for point in points]

    axes.plot(*zip(*front(points, about["better"]), strict=True), color=FAINT, lw=0.8)
    for point in points:
        bars = [[point.estimate - point.low], [point.high - point.estimate]]
        style = {"color": colours[point.name], "fmt": "o", "ms": 6, "lw": 1.4, "capsize": 3}
        axes.errorbar(point.cost, point.estimate, bars, **style)
    for row in evaluation["rows"].values():
        if row["role"] == NOISE_FLOOR and (interval := _finite(row, metric)):
            if is_near(interval[0], values):
                axes.axhline(interval[0], color=FAINT, lw=1, ls="--")
                axes.axhspan(*interval[1:], color=FAINT, alpha=0.15, lw=0)
                values += interval
            else:
                say_beyond(axes, f"noise floor {interval[0]:.3g}", interval[0] > max(values))
        if row["role"] == BASELINE and row.get(cost):
            axes.axvline(row[cost], color=INK, lw=1, ls=":")
            costs.append(row[cost])
    if is_logarithmic(values):
        axes.set_yscale("log")
        label_decades(axes.yaxis)
    if max(costs) > 10 * min(costs):
        axes.set_xscale("log")
        label_decades(axes.xaxis)
    axes.margins(0.12, 0.14)
    arrow = "↑" if about["better"] == "higher" else "↓"
    axes.set(xlabel=COSTS[cost].format(noun=noun(evaluation)), ylabel=f"{about['title']} {arrow}")

    labels = [point.name for point in points]
    if len(points) > _NAMED:
        labels = [str(number) for number in range(1, len(points) + 1)]
        names = "\n".join(f"{number}  {point.name}" for number, point in enumerate(points, 1))
        axes.annotate(names, (1.02, 1), xycoords="axes fraction", va="top", fontsize=7.5)
    figure.draw_without_rendering()  # labels are placed in the final frame of the axes
    _place_labels(axes, points, labels)


def front(points: list[Point], better: str) -> list[tuple[float, float]]:
    """Draw stairs through the points that no other is both cheaper and better than, cheapest first."""
    sign = 1 if better == "higher" else -1
    stairs: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda point: (point.cost, -sign * point.estimate)):
        if not stairs:
            stairs = [(point.cost, point.estimate)]
        elif sign * point.estimate > sign * stairs[-1][1]:
            stairs += [(point.cost, stairs[-1][1]), (point.cost, point.estimate)]
    return stairs


def _place_labels(axes: "Axes", points: list[Point], labels: list[str]) -> None:
    """Write each point's label beside it, where it covers the least of what is there already."""
    from matplotlib.transforms import Bbox

    frame = axes.get_window_extent()
    lines = [line.get_transform().transform(line.get_xydata()) for line in axes.lines]
    taken = [Bbox(ends).padded(1) for line in lines for ends in pairwise(line)]
    for point in points:
        bar = axes.transData.transform([(point.cost, point.low), (point.cost, point.high)])
        taken.append(Bbox(bar).padded(4))
    for point, label in zip(points, labels, strict=True):
        text = axes.annotate(
            label, (point.cost, point.estimate), (0, 0), textcoords="offset points", fontsize=8
        )

        def cost(place: tuple[int, int], text: "Annotation" = text) -> float:
            _move(text, place)
            box = text.get_window_extent()
            outside = box.width * box.height - _shared(box, frame)
            return 2 * outside + sum(_shared(box, other) for other in taken)

        _move(text, min(_PLACES, key=cost))
        taken.append(text.get_window_extent())


def _move(text: "Annotation", place: tuple[int, int]) -> None:
    right, up = place
    text.set(
        position=place,
        ha="left" if right > 0 else "right" if right < 0 else "center",
        va="center_baseline" if not up else "bottom" if up > 0 else "top",
    )


def _shared(one: Any, other: Any) -> float:
    """Return the area of two boxes' intersection."""
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return max(width, 0) * max(height, 0)
