"""The page of a study: HTML that needs no other file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dma_diffusers.eval.study import plots
from dma_diffusers.eval.study.recommend import HEADER, table

_TEMPLATE = Path(__file__).with_name("page.html.jinja")


def html(document: Mapping[str, Any]) -> str:
    """Return the page as text; the same document gives the same page."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATE.parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(_TEMPLATE.name).render(
        document=document,
        header=HEADER,
        recommended=table(document),
        medians=plots.medians(document["rows"]),
        figures=_figures(document),
    )


def _figures(document: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """A title, a plot and what it shows, of each plot that there is."""
    found = [
        (
            "Crossovers", plots.crossover_map(document),
            "QSNR over crest factors. Lines are theory, of Gaussian blocks with scales a factor of 1.5 too large; "
            "points are the tensors of each layer and step, unrotated, at the median of their blocks. Left of the "
            "dotted line, as published for integers that reach 2^(bits-1), the integer errs less.",
        ),
        (
            "Crest factors", plots.crests(document),
            "Of the blocks of 32 numbers that share a scale: 5 to 95 % thin, 25 to 75 % thick, means over layers and "
            "steps.",
        ),
        (
            "Measured and predicted", plots.prediction(document),
            "Points are of a layer, a step, a format and a rotation. The prediction knows each block's crest factor "
            "and scale.",
        ),
        (
            "Q and K", plots.errors(document, "qk"),
            "Error of attention's output where q and k are rounded and nothing else. Filled: K less its mean. Bars "
            "are 95 % intervals over prompts.",
        ),
        (
            "P", plots.errors(document, "p"),
            "Error of the output where probabilities are rounded and nothing else. Formats with a u are unsigned.",
        ),
        (
            "V", plots.errors(document, "v"),
            "Error of the output where v is rounded along the keys and nothing else. Filled: V less its mean, which is "
            "added to the output.",
        ),
        (
            "Linear layers", plots.errors(document, "linear"),
            "Error of linear layers' outputs, inputs and weights rounded.",
        ),
        (
            "Pairs of formats", plots.pairs(document),
            "Error of attention's output with everything rounded, K less its mean, unrotated.",
        ),
        (
            "Over noise levels", plots.over_noise(document),
            "Error of attention's output where q and k are rounded, K less its mean, unrotated; means over layers.",
        ),
        ("Layer by layer", plots.layers(document), "The same by layer, means over steps."),
    ]  # fmt: skip
    return [(title, plot, caption) for title, plot, caption in found if plot]
