"""Fine-tuning for low precision: a model that trains with the numbers that it will run with.

>>> from dma_diffusers.finetune import prepare, restore
>>> prepare(transformer, linears="quartet", attention=DMAConfig(high="mxfp8", low="mxfp4"))
>>> ...  # any training loop
>>> restore(transformer)  # stock layers with the trained weights
"""

from importlib import import_module

_EXPORTS = {
    "Prepared": "preparation",
    "QuartetLinear": "module",
    "prepare": "preparation",
    "restore": "preparation",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
