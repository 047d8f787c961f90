"""`dma-diffusers doctor` and `compile`: what this machine runs, what others would."""

from typing import Annotated

import typer

from dma_diffusers.cli.attention import Words
from dma_diffusers.cli.console import Json, print_json, print_table, quiet, require


def doctor(
    shape: Annotated[
        str | None,
        typer.Option(
            help="Of an attention call, HxNxD or BxHxNxD, such as 24x4608x128: says the memory it takes."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what this machine can run, and if not, why."""
    from dma_diffusers.doctor import diagnose, parse_size

    size = parse_size(shape) if shape else None
    with quiet():
        findings = diagnose(size)
    if as_json:
        print_json(findings)
        return
    print(
        f"torch {findings['torch']}, triton {findings['triton'] or 'absent'}, {findings['gpu'] or 'no GPU'}"
    )
    header = ["formats", "lowering", "runs", "why"]
    rows = [
        [found["formats"], found["name"], "yes" if found["runs"] else "no", found["reason"]]
        for found in findings["lowerings"]
    ]
    if size:
        header.insert(3, "extra MiB")
        for row, found in zip(rows, findings["lowerings"], strict=True):
            extra = found["extra_bytes"]
            row.insert(3, "" if extra is None else f"{extra / 2**20:.1f}")
    print_table(header, rows)
    if size:
        print(
            "extra: the most that a call takes beside q, k, v and its output; of the reference it is not told"
        )


def compile_kernels(
    target: Annotated[str, typer.Option(help="sm_100, sm_103, sm_120, sm_90, sm_89, sm_87, sm_86 or sm_80.")],
    high: Words = None,
    low: Words = None,
    linears: Annotated[
        bool, typer.Option("--linears", help="The kernels of linear layers, not those of attention.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compile every kernel variant for an architecture, ahead of time, on any machine."""
    require(("triton",), "it is there for Linux alone")
    from dma_diffusers.kernels.ahead_of_time import compile as attention
    from dma_diffusers.kernels.ahead_of_time import linears as layers

    if linears and (high or low):
        raise ValueError("--high and --low name the formats of attention: leave them out with --linears")
    with quiet():
        variants = (
            layers.compile_all(target) if linears else attention.compile_all(target, high=high, low=low)
        )
    if as_json:
        print_json(variants)
        return
    columns = [name for name in variants[0] if name != "loops"]  # instruction counts, for --json alone
    print_table(columns, [[variant[name] for name in columns] for variant in variants])
