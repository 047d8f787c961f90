"""Files of quantised linear layers: safetensors, as small as the bits say.

A tensor is called `<layer>:<part>`, with the parts of `LinearWeight.packed`; of files without weights there are the
permutations alone. The metadata has, as JSON under
"dma-diffusers linears": the version, the method, and of each model its class, its layers (sides, groups, input scale,
the layers with the same input, and some numbers of the stock weight, by which another model's is told), the reasons
for those that were left alone, and the shares of bits over noise levels.
"""

import json
from collections import defaultdict
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dma_diffusers.kernels.linears.groups import Groups
from dma_diffusers.kernels.linears.weight import LinearWeight
from dma_diffusers.kernels.training.recipe import LINEARS
from dma_diffusers.linears.exclusions import Choice, block_of, linear_layers, why_not_plain
from dma_diffusers.linears.module import QuantisedLinear
from dma_diffusers.linears.plans import Plan
from dma_diffusers.linears.quantise import (
    Attachment,
    attaching,
    attachment_of,
    check_not_quantised,
    layer_of,
    quantisable,
    sample_of,
)

KEY, VERSION = "dma-diffusers linears", 1
_TOLERANCE = 2.0**-7  # of numbers that were stored in another dtype


@dataclass(frozen=True)
class Header:
    """The metadata of a file of linear layers.

    models: of each, by the prefix of its module names, what `save_linears` says of it.
    """

    path: str
    method: str
    models: dict[str, Any]

    def check(self, pipe_or_model: Any) -> list[tuple[str, torch.nn.Module]]:
        """The models that the file is for, each after its prefix in the file.

        Raises ValueError, naming the layers, for other models, and for layers that something else quantised already.
        """
        models = [model for _, model in quantisable(pipe_or_model)]
        if len(models) != len(self.models):
            raise ValueError(f"{self.path} is for {len(self.models)} transformers, not for {len(models)}")
        for model, stored in zip(models, self.models.values(), strict=True):
            kind, layers = type(model).__name__, linear_layers(model)
            if stored["class"] != kind:
                raise ValueError(f"{self.path} is for {stored['class']}, not for {kind}")
            record = attachment_of(model)
            samples = record.samples if record else {}
            for name in stored["layers"]:
                if name in layers and name not in samples:
                    _check_plain(name, layers[name])
            differing = [
                name
                for name, of in stored["layers"].items()
                if _differs(layers.get(name), samples.get(name), of)
            ]
            # A deeper model has the same layers and more; it is blocks that count, since adapters add layers to them.
            blocks = {block_of(model, name)[0] for name in [*stored["layers"], *stored["left"]]}
            differing += [name for name in layers if block_of(model, name)[0] not in blocks | {""}]
            if differing:
                more = f", and {len(differing) - 3} more" if len(differing) > 3 else ""
                raise ValueError(
                    f"{self.path} was made for another {kind}: these layers have other sides or weights: "
                    f"{', '.join(differing[:3])}{more}"
                )
        return list(zip(self.models, models, strict=True))


def read_header(path: str | PathLike[str]) -> Header:
    """The metadata of a file. Raises OSError where it can't be read, ValueError where it is no such file."""
    path = fspath(path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path} of linear layers")
    try:
        with safe_open(path, "pt") as file:
            stored = (file.metadata() or {}).get(KEY)
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from None
    if stored is None:
        raise ValueError(f"{path} is no file of linear layers: save_linears writes them")
    header = json.loads(stored)
    if header["version"] != VERSION:
        raise ValueError(f"{path} has version {header['version']}, and only {VERSION} can be read")
    return Header(path, header["method"], header["models"])


def save_linears(pipe_or_model: Any, path: str | PathLike[str], *, weights: bool = True) -> None:
    """Writes the quantised linear layers of a model or a pipeline, for `load_linears` and `DMAConfig(linears=path)`.

    Args:
        pipe_or_model: a pipeline or a transformer whose linear layers are quantised.
        path: the file to write, in the format of safetensors.
        weights: False leaves the quantised weights out. The file then has formats, permutations and input scales, and
            loading it quantises the weights of the model.

    Raises:
        ValueError: where nothing is quantised, or weights are only rounded in each call, as in fine-tuning.

    Examples:
        >>> quantize_linears(pipe, "int8")
        >>> save_linears(pipe, "linears.safetensors")
    """
    tensors: dict[str, torch.Tensor] = {}
    models: dict[str, Any] = {}
    for prefix, model in quantisable(pipe_or_model):
        record = attachment_of(model)
        if record is None:
            raise ValueError(
                f"the linear layers of {type(model).__name__} are not quantised: nothing to save"
            )
        method = record.method
        if method in LINEARS:
            raise ValueError(
                f"linears={method!r} rounds the model's own weights in each call: save the model"
            )
        layers: dict[str, Any] = {}
        for name in record.layers:
            layer = layer_of(model, name)
            if not isinstance(layer, QuantisedLinear):
                raise ValueError(
                    f"{name} is not quantised any more: call dma_diffusers.restore, and quantise anew"
                )
            scale = layer.input_scale
            layers[name] = {
                "sides": [layer.in_features, layer.out_features],
                "formats": layer.groups.formats,
                "widths": layer.groups.widths,
                "input_scale": None if scale is None else float(scale),
                "sample": record.samples[name].tolist(),
                "shared": record.plans[name].shared,
                "keeps": record.plans[name].keeps,
            }
            for part, tensor in layer.quantised.packed().items():
                if weights or part == "permutation":
                    tensors[f"{prefix}{name}:{part}"] = tensor.detach().cpu().contiguous()
        models[prefix] = {
            "class": type(model).__name__, "layers": layers, "kept": record.kept, "left": record.left,
            "over_time": record.over_time,
        }  # fmt: skip
    header = {"version": VERSION, "method": method, "models": models}
    save_file(tensors, fspath(path), {KEY: json.dumps(header)})


def load_linears(
    pipe_or_model: Any, path: str | PathLike[str], *, keep_original: bool = True, lowering: str = "auto"
) -> None:
    """Puts the quantised linear layers of a file into the place of the stock ones; they compute what was saved.

    Args:
        pipe_or_model: a pipeline or a transformer like the one that was saved. Its weights may be on the meta device,
            and its biases may not.
        path: a file of `save_linears`.
        keep_original: as in `quantize_linears`.
        lowering: as in `quantize_linears`.

    Raises:
        OSError: where the file can't be read.
        ValueError: where it is none, where linear layers are quantised already, by us or by something else, where the
            model is another one, naming layers that differ, or where the lowering can't run them.

    Examples:
        >>> load_linears(pipe, "linears.safetensors")
    """
    header = read_header(path)
    for _, model in quantisable(pipe_or_model):
        check_not_quantised(model)
    for prefix, model in header.check(pipe_or_model):
        stored = header.models[prefix]
        present = linear_layers(model)
        choice = Choice(
            {name: present[name] for name in stored["layers"]},
            {name: block_of(model, name)[0] for name in stored["layers"]},
        )
        record = Attachment(
            header.path, tuple(choice.layers), stored["kept"], stored["left"], keep_original,
            samples={name: torch.tensor(of["sample"]) for name, of in stored["layers"].items()},
            over_time=stored["over_time"], of_file=stored,
        )  # fmt: skip
        with safe_open(header.path, "pt") as file, attaching(model, record) as attach:
            parts = defaultdict(list)
            for key in file.keys():  # noqa: SIM118  # it is no dict
                layer, _, part = key.rpartition(":")
                parts[layer].append(part)
            for name, of in stored["layers"].items():
                groups = Groups(tuple(of["formats"]), tuple(of["widths"]))
                full = prefix + name
                packed = {part: file.get_tensor(f"{full}:{part}") for part in parts[full]}
                plan = Plan(groups, packed.get("permutation"), of["input_scale"], of["shared"], of["keeps"])
                weight = LinearWeight.from_packed(groups, packed) if "codes.0" in packed else None
                if weight is None and present[name].weight.device.type == "meta":
                    raise ValueError(
                        f"neither {header.path} nor the model has the weight of {name}: load the model"
                    )
                attach(name, choice, plan, lowering, weight)


def _check_plain(name: str, layer: torch.nn.Linear) -> None:
    """Raises ValueError for a layer that can't be replaced by one of a file."""
    if reason := why_not_plain(layer):
        raise ValueError(f"{name} is {reason}: load the file onto the model in full precision")
    if layer.bias is not None and layer.bias.device.type == "meta":
        raise ValueError(f"{name} has no bias yet, and files have none: load the model's biases first")


def _differs(layer: torch.nn.Linear | None, sample: torch.Tensor | None, stored: dict[str, Any]) -> bool:
    """Tells whether a layer has other sides or other numbers than the one that a file has.

    sample: of the stock weight, for a layer that is quantised already.
    """
    if layer is None or [layer.in_features, layer.out_features] != stored["sides"]:
        return True
    if sample is None and layer.weight.device.type == "meta":
        return False
    found = sample_of(layer.weight) if sample is None else sample
    return not torch.allclose(found, torch.tensor(stored["sample"]), rtol=_TOLERANCE, atol=0)
