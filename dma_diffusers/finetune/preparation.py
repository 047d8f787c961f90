"""Preparing a model for fine-tuning at low precision, and putting stock layers back."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from dma_diffusers.attach import apply, restore_attention
from dma_diffusers.components import device_of, unwrapped
from dma_diffusers.config import DMAConfig
from dma_diffusers.finetune.layers import layers_of
from dma_diffusers.finetune.module import QuartetLinear
from dma_diffusers.finetune.swap import put_in
from dma_diffusers.kernels.backward.reference import why_not
from dma_diffusers.kernels.lowerings import Choice, architecture
from dma_diffusers.kernels.training.lowering import choose
from dma_diffusers.kernels.training.recipe import LINEARS, recipe_of
from dma_diffusers.linears.quantise import set_layer

if TYPE_CHECKING:
    import peft


@dataclass(frozen=True)
class Prepared:
    """A record of what `prepare` did to a model; it is kept on the model, too.

    layers: the names of the linear layers that train at low precision. left: the reasons for which others don't.
    has_attention: whether attention was intercepted. lowering: how products of the layers run on the model's device,
    and why; None without layers.
    """

    layers: tuple[str, ...]
    left: dict[str, str]
    has_attention: bool
    lowering: Choice | None


def prepare(
    model: torch.nn.Module,
    linears: str | None = None,
    attention: DMAConfig | None = None,
    *,
    rounding: str = "nearest",
    lora: "peft.LoraConfig | None" = None,
) -> Prepared:
    """Makes a model train with the numbers that it will run with; any training loop can follow.

    model: any module. Its parameters stay the same objects, with the same names and numbers.
    linears: the recipe of its linear layers, or None to leave them alone.
        "qat": MXFP4 forward (QuEST), 16 bits backward. "quartet": MXFP4 in all three products (arXiv 2505.14669).
        "quartet2": NVFP4 in all three, with an unbiased backward pass (arXiv 2601.22813). "mxint8": MXINT8 in all
        three. Gradients of what QuEST clipped are zero. Left alone are embedders, norms, modulation, the final
        projection, parts that are known as sensitive, and sides that are no multiple of 32.
    attention: the configuration of the attention of a Diffusers transformer; None leaves it alone. If it has `linears`,
        as the policy of an earlier fine-tuning does, that is the recipe.
    rounding: of "quartet"'s backward pass: "nearest" or "stochastic".
    lora: adapters of peft that are trained on top; everything else is frozen then.

    The layers round in evaluation, too: a prepared model draws with the numbers that it trained with, and later `apply`
    does with the recipe as `DMAConfig(linears=…)`. Layers of `quantize_linears` have the same formats, but other scales
    and no rotation.
    `restore` puts stock layers back, with the trained weights; saving the model needs no such thing, since names and
    parameters are those of stock layers.
    Raises ValueError, in one line, for a model that is prepared or quantised already, another recipe or rounding,
    nothing to prepare, no layer that can be, an `attention` that `dma_diffusers.apply` refuses, whose `linears` is no
    recipe or another one, or that can't be trained (`check_attention`), ImportError for `lora` without peft, TypeError
    for something else than a module. The model is as it was then.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"prepare takes a module, got {type(model).__name__}: give pipe.transformer")
    model = unwrapped(model)
    kind = type(model).__name__
    if prepared_of(model):
        raise ValueError(f"{kind} is prepared already: call dma_diffusers.finetune.restore first")
    if attention is not None:
        linears, attention = _told_apart(linears, attention)
    if linears is None and attention is None and lora is None:
        raise ValueError("there is nothing to prepare: give linears, attention or lora")
    if linears is None and rounding != "nearest":
        raise ValueError(f"rounding={rounding!r} is that of linear layers: give linears, too")
    recipe = None if linears is None else recipe_of(linears, rounding)
    if lora is not None:
        _check_lora(lora)
    if attention is not None:
        check_attention(attention)
    layers, left = layers_of(model, recipe) if recipe else ({}, {})
    if attention is not None:
        apply(model, attention)
    lowering = None if recipe is None else choose(architecture(device_of(model, model)), recipe)
    record = Prepared(tuple(layers), left, attention is not None, lowering)
    model._dma_prepared = record  # type: ignore[assignment]  # an attribute like any other
    try:
        if recipe:
            put_in(model, layers, recipe)
        if lora is not None:
            _add_adapters(model, lora)
    except BaseException:
        restore(model)
        raise
    return record


def restore(model: torch.nn.Module) -> None:
    """Puts stock linear layers with the trained weights, and stock attention, back; it does nothing where none was.

    Adapters stay.
    """
    model = unwrapped(model)
    record = prepared_of(model)
    if record is None:
        return
    if record.has_attention:
        restore_attention(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, QuartetLinear):
            set_layer(model, name.removesuffix(".base_layer"), layer.stock())
    del model._dma_prepared


def prepared_of(model: torch.nn.Module) -> Prepared | None:
    """The record of what `prepare` did to this model; None if it did nothing."""
    return getattr(model, "_dma_prepared", None)


def check_attention(config: DMAConfig) -> None:
    """Raises ValueError for a configuration whose calls stock attention would train, or that has no backward."""
    for each in (config, *(config.of_module(name) for name in dict(config.modules))):
        for entry in each.entries:
            lowering = entry.config.lowering
            if lowering in ("fastest", "stock"):
                raise ValueError(
                    f"attention with lowering={lowering} leaves calls that train to stock, at full precision: "
                    "give lowering=auto"
                )
            if reason := why_not(entry.config.asked):
                raise ValueError(
                    f"attention={entry.config.words} can't be trained: {reason}; every other policy has one"
                )


def _told_apart(linears: str | None, config: DMAConfig) -> tuple[str | None, DMAConfig | None]:
    """The recipe of linear layers, which `finetune` saves with the attention's configuration, and the rest of that.

    None is left of what had linear layers alone.
    """
    if config.linears is None:
        return linears, config
    if config.linears not in LINEARS:
        raise ValueError(
            f"linears={config.linears!r} of the attention's configuration have no backward: "
            "leave it out there, and give linears to prepare"
        )
    if linears not in (None, config.linears):
        raise ValueError(f"linears={linears!r} here, and {config.linears!r} in the attention's configuration")
    return config.linears, None if config.lowering == "stock" else replace(config, linears=None)


def _check_lora(lora: Any) -> None:
    try:
        import peft
    except ImportError:
        raise ImportError("lora needs peft: pip install peft") from None
    if not isinstance(lora, peft.LoraConfig):
        raise TypeError(f"lora must be a peft.LoraConfig, got {type(lora).__name__}")


def _add_adapters(model: torch.nn.Module, lora: "peft.LoraConfig") -> None:
    """Puts adapters on top, which train; peft freezes everything else."""
    import peft

    # Diffusers' own way, after which it knows how to save them.
    if hasattr(model, "add_adapter"):
        model.add_adapter(lora)  # type: ignore[operator]
    else:
        peft.inject_adapter_in_model(lora, model)
