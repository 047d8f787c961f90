"""Spend precision where a diffusion transformer needs it: in attention, and in linear layers."""

from importlib import import_module
from pathlib import Path

_here = Path(__file__).resolve().parent
if not (_here / "kernels").is_dir() and (_here.parent / "pyproject.toml").is_file():
    __path__.append(str(_here.parent))  # a checkout: kernels/, pipelines/, eval/ are siblings

__version__ = "0.1.0"

_EXPORTS = {
    "DMAAttnProcessor": "processor",
    "DMAConfig": "config",
    "apply": "attach",
    "calibrate_linears": "linears.quantise",
    "load_linears": "linears.files",
    "quantize_linears": "linears.quantise",
    "report": "attach",
    "restore": "attach",
    "save_linears": "linears.files",
    "warmup": "warming",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _EXPORTS[name] == "attach":  # whoever applies DMA can set stock processors afterwards to remove it
        import_module(f"{__name__}.processor")
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
