"""The options for arguments of a pipeline's call that commands have in common."""

from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer

from dma_diffusers.cli.console import given, sizes_of

Size = Annotated[
    str | None, typer.Option(help="Width x height in pixels, such as 832x480, or one number for a square.")
]


Loras = Annotated[
    list[str] | None,
    typer.Option(help="A LoRA file, with a weight if need be, such as style.safetensors:0.8; repeat it."),
]


def sides_of(size: str | None) -> dict[str, int]:
    """Width and height of `--size`, by name; nothing where it is left out. ValueError, in one line, for other text."""
    if size is None:
        return {}
    sides = sizes_of("--size", size)
    if len(sides) > 2:
        raise ValueError(f"--size {size}: give width and height, as in 832x480, or one number for a square")
    return {"width": sides[0], "height": sides[-1]}


@dataclass(frozen=True)
class CallOptions:
    """The options that go to a pipeline's call as they are; None where the command line gives none."""

    guidance_scale: Annotated[
        float | None, typer.Option(help="Guidance, in the pipeline's own way; its default if left out.")
    ] = None
    true_cfg_scale: Annotated[
        float | None,
        typer.Option(
            help="Classifier-free guidance of distilled models; a negative prompt needs more than 1."
        ),
    ] = None
    max_sequence_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens that are read of a prompt; what is cut off is said.")
    ] = None
    negative_prompt: Annotated[str | None, typer.Option(help="A prompt for what not to draw.")] = None

    @property
    def given(self) -> dict[str, Any]:
        """The options that the command line gives, by name."""
        return given(asdict(self))
