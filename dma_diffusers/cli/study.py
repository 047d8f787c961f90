"""`dma-diffusers study`: what each format loses on a model's tensors, and which one to use."""

from typing import Annotated

import typer

from dma_diffusers.cli.console import Json, print_json, print_table, quiet


def study(
    synthetic: Annotated[
        bool, typer.Option("--synthetic", help="The theory and random numbers alone, without a model.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure what formats lose, and compare it with what theory predicts from crest factors."""
    with quiet():
        from dma_diffusers.eval.study import synthetic as random_numbers

        document = random_numbers.document()
    if as_json:
        print_json(document)
        return
    print_table(random_numbers.HEADER, random_numbers.rows(document))
    print("\n".join(random_numbers.lines(document)))
