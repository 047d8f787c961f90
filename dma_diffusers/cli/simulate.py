"""`dma-diffusers simulate`: how much of attention a neighbourhood would skip, and what that saves on a GPU."""

import math
import re
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from dma_diffusers.cli.console import Json, print_json, print_table, require, sizes_of

COUNTS = "Speed-ups are of tiles counted, not of seconds."
_COST = 0.1


@dataclass(frozen=True)
class Boxes:
    """The options that say a neighbourhood and its tiles."""

    window: Annotated[str | None, typer.Option(help="Keys that each query sees, such as 80x80.")] = None
    stride: Annotated[str | None, typer.Option(help="Queries that share a window; 1x1 if left out.")] = None
    dilation: Annotated[str | None, typer.Option(help="Distance between keys; 1x1 if left out.")] = None
    causal: Annotated[
        str | None, typer.Option(help="1 where no query sees later keys, such as 1x0x0; none if left out.")
    ] = None
    q_tile: Annotated[
        str | None, typer.Option(help="Box of tokens; as the other if left out, or planned.")
    ] = None
    kv_tile: Annotated[
        str | None, typer.Option(help="Box of tokens; as the other if left out, or planned.")
    ] = None

    @property
    def sizes(self) -> list[tuple[int, ...] | None]:
        """The sizes for each dimension, in the order of the options; None for an option that is not given."""
        return [value and _sizes(name, value) for name, value in asdict(self).items()]


@dataclass(frozen=True)
class Times:
    """The options of predicted times."""

    gpu: Annotated[
        str | None,
        typer.Option(help="Predict times too: h100, h200, b200 or b300; only the h200 was measured."),
    ] = None
    policy: Annotated[
        str | None,
        typer.Option(
            help="With --gpu, what any policy costs there: its words, such as 'importance(budget=0.05)'."
        ),
    ] = None
    schedule: Annotated[
        str | None,
        typer.Option(
            help="Instead of --policy, what a schedule costs over the run's steps: its words, such as "
            "'sigma>0.9: dense(); importance(budget=0.05)'."
        ),
    ] = None
    steps: Annotated[
        int | None, typer.Option(min=1, max=1000, help="With --schedule, the run's denoising steps.")
    ] = None
    shift: Annotated[
        float | None,
        typer.Option(
            help="With --schedule, the shift of their noise levels: FLUX's is exp(mu); 1 if left out."
        ),
    ] = None
    left_out: Annotated[
        float, typer.Option(help="With a policy of skip_softmax: the share of LOW pairs that it left out.")
    ] = 0.0
    high: Annotated[
        str | None, typer.Option(help="Format of HIGH tiles, with --gpu; its default if left out.")
    ] = None
    low: Annotated[str | None, typer.Option(help="Format of LOW tiles, likewise.")] = None
    heads: Annotated[int, typer.Option(min=1, help="Heads times batch, for times.")] = 24
    head_dim: Annotated[int, typer.Option(min=1, max=256, help="Channels of a head, for times.")] = 128


def simulate(
    grid: Annotated[str, typer.Option(help="Tokens of each dimension, such as 256x256 or 30x48x80.")],
    boxes: Boxes,
    times: Times,
    text: Annotated[
        int, typer.Option(help="Text tokens: seen by every query, seeing every key, in tiles of their own.")
    ] = 0,
    attention_share: Annotated[
        float | None,
        typer.Option(help="Attention's share of the run's time, 0 to 1; gives the end to end speed-up."),
    ] = None,
    dense_steps: Annotated[
        str | None, typer.Option(help="K/N: so many of the run's steps at full attention, such as 9/28.")
    ] = None,
    search: Annotated[
        bool, typer.Option("--search", help="Propose what is left out, within a cost.")
    ] = False,
    cost: Annotated[
        float | None,
        typer.Option(help=f"Share of dense attention to compute at most, with --search; {_COST}."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="A picture of the map, as .svg or .png: of the window, of the first proposal with --search, or of the "
            "first head of a --policy."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Count the KV tiles that neighbourhood attention visits on a grid, and the speed-up that leaves room for.

    Counts tiles; with --gpu, times are predicted as well, of any --policy too. No GPU is asked.
    """
    others = (*asdict(boxes).values(), search or None, cost)
    says_all = "--policy" if times.policy else "--schedule" if times.schedule else ""
    if says_all and (times.gpu is None or any(option is not None for option in others)):
        raise ValueError(
            f"{says_all} says all of the map: give it --grid, --text and --gpu, and no windows or tiles"
        )
    if times.schedule:
        _check_schedule(times, dense_steps, plot)
    elif times.steps is not None or times.shift is not None:
        raise ValueError("--steps and --shift are for --schedule: add it, or leave them out")
    if times.left_out and not times.policy:
        raise ValueError("--left-out is for --policy, such as 'skip_softmax(threshold=0.001)'")
    if boxes.window is None and not search and not says_all:
        raise ValueError("give --window, such as 80x80, or --search for proposals")
    if cost is not None and not search:
        raise ValueError("--cost is for --search: add it, or leave --cost out")
    if dense_steps is not None and attention_share is None:
        raise ValueError("--dense-steps needs --attention-share, attention's share of the run's time")
    if times.gpu is None and (times.high or times.low):
        raise ValueError("--high and --low are for predicted times: add --gpu, or leave them out")
    if times.gpu is not None:
        require(("triton",), "pip install triton")
    if plot:
        require(("matplotlib",), "pip install 'dma-diffusers[eval]'")
    sizes = sizes_of("--grid", grid)
    widths, strides, dilations, is_causal, q_box, kv_box = boxes.sizes
    dense = (0, 1) if dense_steps is None else _steps(dense_steps)

    from dma_diffusers.eval.simulator import plot as picture
    from dma_diffusers.eval.simulator import summary
    from dma_diffusers.eval.simulator.count import Count, end_to_end
    from dma_diffusers.eval.simulator.search import search as propose
    from dma_diffusers.kernels.tiling.boxes import plan
    from dma_diffusers.kernels.tiling.neighborhood import neighborhood
    from dma_diffusers.pipelines.files import check_writable, write_atomically

    if attention_share is not None:
        end_to_end(1, attention_share, dense)  # refuses what it can't take before anything runs
    predict = None
    if times.gpu is not None:
        from dma_diffusers.eval.simulator import predict as predictions

        high, low = predictions.default_formats(times.gpu)
        on_gpu = {"gpu": times.gpu, "heads": times.heads, "head_dim": times.head_dim}
        on_gpu |= {"high": times.high or high, "low": times.low or low}
        predict = partial(predictions.predict, **on_gpu)
    if says_all:
        _print_policy(times, on_gpu, sizes, text, attention_share, dense, plot, as_json)
        return
    axes, notes = neighborhood(sizes, widths, strides, dilations, is_causal)
    if search:
        counts = propose(
            axes,
            _COST if cost is None else cost,
            any_window=widths is None,
            any_stride=strides is None,
            q_tile=q_box,
            kv_tile=kv_box,
            text=text,
        )
    else:
        box = plan([max(axis.class_lengths) for axis in axes])[0]
        counts = [Count(axes, q_box or kv_box or box, kv_box or q_box or box, text)]
        notes += summary.box_notes(counts[0])
    if plot:
        picture.check_plot(plot, *counts[0].grid_tiles)
        check_writable(plot)
    records = [summary.record(count, attention_share, dense, predict) for count in counts]
    if plot:
        write_atomically(plot, picture.plot(counts[0], plot.suffix[1:]))
    if as_json:
        shared = {
            "counts": COUNTS,
            "attention_share": attention_share,
            "dense_steps": dense_steps,
            "notes": notes,
        }
        print_json(shared | ({"candidates": records} if search else records[0]))
        return
    print_table(*(summary.candidates(records) if search else summary.lines(records[0])))
    for line in (*(f"note: {note}" for note in notes), COUNTS):
        print(line)
    if predict:
        if not search:
            print_table(*summary.times(records[0]["prediction"]))
        print(f"Times are {records[0]['prediction']['label']}.")


def _check_schedule(times: Times, dense_steps: str | None, plot: Path | None) -> None:
    """Raise ValueError, in one line, for options that a schedule can't have, or lacks."""
    if times.policy:
        raise ValueError("--policy and --schedule: give one of them")
    if times.steps is None:
        raise ValueError("--schedule needs --steps, the number of the run's denoising steps")
    if dense_steps is not None:
        raise ValueError(
            "--dense-steps and --schedule: make them an entry of that, such as sigma>0.9: dense()"
        )
    if plot:
        raise ValueError(
            "--plot draws one map, and a schedule has several: give one of its policies as --policy"
        )


def _print_policy(
    times: Times,
    on_gpu: dict[str, Any],
    grid: tuple[int, ...],
    text: int,
    attention_share: float | None,
    dense_steps: tuple[int, int],
    plot: Path | None,
    as_json: bool,
) -> None:
    """Print what a policy or a schedule costs, and draw a policy's map if asked."""
    from dma_diffusers import schedule as schedules
    from dma_diffusers.eval.simulator import plot as picture
    from dma_diffusers.eval.simulator import policy as simulator
    from dma_diffusers.eval.simulator import schedule as of_schedule
    from dma_diffusers.eval.simulator import summary
    from dma_diffusers.kernels.tiling.layout import Layout, tiles
    from dma_diffusers.kernels.tiling.policies import parse
    from dma_diffusers.pipelines.files import check_writable, write_atomically

    tokens = text + math.prod(grid)
    layout = Layout(tokens, tokens, (0, text), grid)
    if times.schedule:
        levels = of_schedule.noise_levels(times.steps or 1, 1.0 if times.shift is None else times.shift)
        counted = of_schedule.record(times.schedule, levels, layout, **on_gpu)
        asked = [parse(part.policy) for part in schedules.read(times.schedule) if part.policy]
        header, rows = of_schedule.lines(counted)
    else:
        policy = parse(times.policy or "")
        if plot:
            picture.check_plot(plot, tiles(tokens), tiles(tokens))
            check_writable(plot)
        counted = simulator.record(policy, layout, **on_gpu, left_out=times.left_out)
        if plot:
            write_atomically(plot, picture.plot_policy(policy, layout, plot.suffix[1:]))
        asked = [policy]
        header, rows = simulator.lines(counted)
    counted["notes"] = [note for policy in asked for note in policy.notes(grid)]
    prediction = summary.with_run(counted["prediction"], attention_share, dense_steps)
    if as_json:
        print_json(counted | {"prediction": prediction})
        return
    print_table(header, rows)
    print_table(*summary.times(prediction))
    for note in counted["notes"]:
        print(f"note: {note}")
    print(f"Times are {prediction['label']}.")


def _sizes(name: str, text: str) -> tuple[int, ...]:
    option = f"--{name.replace('_', '-')}"
    return sizes_of(option, text, range(2)) if name == "causal" else sizes_of(option, text)


def _steps(text: str) -> tuple[int, int]:
    if not re.fullmatch(r"\d+/\d+", text):
        raise ValueError(f"--dense-steps {text!r}: give K/N, so many of so many steps, as in 9/28")
    dense, steps = text.split("/")
    return int(dense), int(steps)
