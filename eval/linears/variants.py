"""Ways to choose the bits of linear layers that are compared: MicroMix, and what it must beat at the same bits.

`python -m dma_diffusers.eval.linears.variants FOLDER` measures the error of each layer of the demo on held-out prompts,
and writes what `dma-diffusers eval --configs FOLDER/rows.yaml` draws with.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
import yaml
from diffusers import DiffusionPipeline
from torch import Tensor

from dma_diffusers.components import device_of
from dma_diffusers.eval import provenance
from dma_diffusers.eval.intervals import bootstrap
from dma_diffusers.eval.linears import synthetic
from dma_diffusers.eval.linears.errors import squared_errors
from dma_diffusers.eval.linears.rows import Rows, draw_sampled
from dma_diffusers.eval.quality.prompts import built_in, read_prompts
from dma_diffusers.linears.calibration import Calibration
from dma_diffusers.linears.exclusions import choose
from dma_diffusers.linears.files import save_linears
from dma_diffusers.linears.plans import Target, make_plans
from dma_diffusers.linears.quantise import calibrate_linears, quantisable, quantize_linears, restore_linears
from dma_diffusers.pipelines.load import DEMO_MODEL, load_pipeline, recommended_call

# In place of the sums of |x| that sort channels, these sort them otherwise; widths and formats stay.
ORDERS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "micromix": lambda total, generator: total,
    "random": lambda total, generator: torch.rand(total.shape, generator=generator, dtype=total.dtype),
    "unsorted": lambda total, generator: torch.arange(1.0, len(total) + 1, dtype=total.dtype),
}
OURS = "micromix"
METHODS = ("mxfp4", "mxfp8", "nvfp4", "fp8", "int8")
AS_THEY_ARE = "micromix, thresholds as they are"
MUST_BEAT = ("random", "unsorted", "mxfp4")


def reorder(seen: Mapping[str, Calibration], order: Callable[[Tensor, torch.Generator], Tensor]) -> None:
    """Make calibrations sort channels in another order; what they say of shares stays."""
    generator = torch.Generator().manual_seed(0)
    for calibration in seen.values():
        for statistics in calibration.inputs.values():
            statistics.total = order(statistics.total, generator)


def measure(
    pipe: DiffusionPipeline, seen: Mapping[str, Calibration], rows: Rows, bits: float, folder: Path
) -> dict[str, Any]:
    """Return the squared relative error of each layer for each prompt, and the average bits, of every method.

    The variants of MicroMix are written into `folder`, as files of linear layers.
    """
    sums = {id(each): each.total for calibration in seen.values() for each in calibration.inputs.values()}
    found = {}
    for name in (*ORDERS, *METHODS):
        if name in ORDERS:
            reorder(seen, ORDERS[name])
            quantize_linears(pipe, "micromix", bits=bits, progress=False)
            save_linears(pipe, folder / f"{name}.safetensors")
            restore_linears(pipe)
            found[name] = _errors(pipe, seen, rows, "micromix", bits)
            for calibration in seen.values():
                for each in calibration.inputs.values():
                    each.total = sums[id(each)]
        else:
            found[name] = _errors(pipe, {}, rows, name, None)
    return found


def measure_synthetic(bits: float) -> dict[str, dict[str, Any]]:
    """Return the same for wide layers with random weights, by the scales of their channels; intervals are over layers.

    MicroMix is measured at the average bits that its own thresholds give, too.
    """
    ways = ORDERS | {name: name for name in METHODS}
    found = {}
    for words, scales in synthetic.SCALES.items():
        methods = {name: synthetic.measure(scales, bits, way) for name, way in ways.items()}
        methods[AS_THEY_ARE] = synthetic.measure(scales, None, ORDERS["micromix"])
        found[words] = summary(methods)
    return found


def summary(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return of each method the relative L2 over layers, its ratio to MicroMix, and in how many layers that errs less.

    relative_l2: the root of the mean of squared errors over layers and prompts. Intervals are 95 %, over prompts.
    """
    ours = np.array(list(found[OURS]["errors"].values()))
    rows = {}
    for name, method in found.items():
        errors = np.array([method["errors"][layer] for layer in found[OURS]["errors"]])
        pair = [errors.mean(0), ours.mean(0)]
        rows[name] = {
            "bits": method["bits"],
            "relative_l2": bootstrap(pair[:1], np.sqrt)._asdict(),
            "over_micromix": bootstrap(pair, lambda its, our: np.sqrt(its / our))._asdict(),
            "layers_where_micromix_errs_less": int((ours.mean(1) < errors.mean(1)).sum()),
            "layers": len(ours),
        }
    return rows


def rows_of(folder: Path, names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Return the rows of `dma-diffusers eval --configs`: attention stays exact, linear layers are one of ours."""
    return {
        name: {
            "preset": "exact",
            "linears": str(folder / f"{name}.safetensors") if name in ORDERS else name,
        }
        for name in names
    }


def table(rows: Mapping[str, Any]) -> str:
    """Return the summary as Markdown."""
    lines = [
        "| Linear layers | Bits | Relative L2 of outputs ↓ | × MicroMix's | Layers in which MicroMix errs less |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, row in rows.items():
        error, ratio = (
            "{estimate:.4f} [{low:.4f}, {high:.4f}]".format(**row[key])
            for key in ("relative_l2", "over_micromix")
        )
        fewer = f"{row['layers_where_micromix_errs_less']} of {row['layers']}" if name != OURS else "–"
        lines.append(f"| {name} | {row['bits']:.2f} | {error} | {ratio} | {fewer} |")
    return "\n".join(lines)


def table_of_wide(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the relative L2 of wide layers as Markdown: a row for each kind of scales, a column for each method."""
    names = [OURS, *MUST_BEAT, *(name for name in METHODS if name not in MUST_BEAT)]
    lines = [
        f"| Scales of channels | {' | '.join(names)} | MicroMix, thresholds as they are |",
        "| --- |" + " ---: |" * (len(names) + 1),
    ]
    for words, rows in found.items():
        cells = [f"{rows[name]['relative_l2']['estimate']:.4f}" for name in names]
        cells[: len(MUST_BEAT) + 1] = [
            "{estimate:.4f} [{low:.4f}, {high:.4f}]".format(**rows[name]["relative_l2"])
            for name in names[: len(MUST_BEAT) + 1]
        ]
        as_they_are = rows[AS_THEY_ARE]
        last = f"{as_they_are['relative_l2']['estimate']:.4f} ({as_they_are['bits']:.2f} bits)"
        lines.append(f"| {words} | {' | '.join(cells)} | {last} |")
    return "\n".join(lines)


def main(
    folder: Annotated[Path, typer.Argument(help="The folder for files, rows and errors; it is made.")],
    bits: Annotated[float, typer.Option(help="Average bits of a weight, scales of blocks included.")] = 5.0,
    calibrated: Annotated[int, typer.Option(help="Prompts to calibrate on, the last of the set.")] = 8,
    held_out: Annotated[int, typer.Option(help="Prompts to measure errors on, the first of the set.")] = 64,
    steps: Annotated[int, typer.Option(help="Denoising steps of both.")] = 8,
) -> None:
    """Compare MicroMix on the demo with random and unsorted channels at the same bits, and with other methods."""
    texts = [prompt.text for prompt in read_prompts(built_in(DEMO_MODEL))[0]]
    if calibrated + held_out > len(texts):
        raise ValueError(f"there are {len(texts)} prompts, not {calibrated} + {held_out}")
    folder.mkdir(parents=True, exist_ok=True)
    pipe = load_pipeline(DEMO_MODEL)
    pipe.set_progress_bar_config(disable=True)
    call = recommended_call(DEMO_MODEL) | {"num_inference_steps": steps}
    rows = Rows()
    draw_sampled(pipe, texts[:held_out], range(held_out), call, rows, lambda *_: None)
    seen = calibrate_linears(pipe, texts[-calibrated:], call=call)
    found = measure(pipe, seen, rows, bits, folder)
    summed = summary(found)
    wide = measure_synthetic(bits)
    about = {
        "bits": bits, "calibrated_on": texts[-calibrated:], "held_out": held_out, "steps": steps,
        "versions": provenance.versions(), "hardware": provenance.hardware(),
    }  # fmt: skip
    (folder / "errors.json").write_text(
        json.dumps({"settings": about, "summary": summed, "methods": found, "synthetic": wide}) + "\n"
    )
    for name, compared in (("rows", (*ORDERS, *METHODS)), ("core", (OURS, *MUST_BEAT))):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(rows_of(folder, compared), sort_keys=False))
    print(f"The demo\n\n{table(summed)}\n\nWide layers\n\n{table_of_wide(wide)}")


def _errors(
    pipe: DiffusionPipeline, seen: Mapping[str, Calibration], rows: Rows, method: str, bits: float | None
) -> dict[str, Any]:
    targets = [Target(prefix, model, choose(model), seen.get(prefix)) for prefix, model in quantisable(pipe)]
    make_plans(targets, method, bits, {})
    errors, taken, weights = {}, 0.0, 0
    for target in targets:
        for name, layer in target.choice.layers.items():
            plan, full, device = target.plans[name], target.prefix + name, device_of(target.model, layer)
            errors[full] = [float(f"{x:.4g}") for x in squared_errors(layer, plan, rows.inputs(full), device)]
            taken += plan.groups.average_bits * layer.weight.numel()
            weights += layer.weight.numel()
    return {"bits": taken / weights, "errors": errors}


if __name__ == "__main__":
    typer.run(main)
