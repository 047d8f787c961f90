"""Processors that attended without `scaled_dot_product_attention`, so that nothing of theirs could be intercepted."""

import logging
from typing import Any

import torch
from torch.nn import functional

from dma_diffusers.internals import scaled_dot_product_attention

logger = logging.getLogger("dma_diffusers")

# Reasons, by the number of a `ForwardContext` and the name of the processor.
_IN_GRAPHS: dict[tuple[int, str], str] = {}


def name_of(thing: Any) -> str:
    """The module and the name of a class or a function, or of the class of anything else."""
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{named.__module__}.{named.__qualname__}"


def reason_of(processor: str) -> str:
    """Tells why nothing was intercepted of the processor of this name."""
    attention = functional.scaled_dot_product_attention
    if attention is not scaled_dot_product_attention:
        return f"scaled_dot_product_attention was replaced by {name_of(attention)}"
    return f"{processor} attended in its own way, without scaled_dot_product_attention"


def warn(model: str, reason: str) -> None:
    """Warns that DMA did not run in a model of this class."""
    logger.warning("%s: DMA attention did not run: %s", model, reason)


@torch.compiler.assume_constant_result
def met_none_in_graph(number: int, model: str, processor: str) -> bool:
    """Notes, while a graph is traced, that it has none of the operator's calls for this processor; warns once."""
    if (number, processor) not in _IN_GRAPHS:
        _IN_GRAPHS[number, processor] = reason_of(processor)
        warn(model, _IN_GRAPHS[number, processor])
    return True


def reason_in_graphs(number: int, processor: Any) -> str:
    """The reason that was noted for a processor in compiled graphs; empty for none."""
    return _IN_GRAPHS.get((number, name_of(processor)), "")
