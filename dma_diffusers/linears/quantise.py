"""Quantising the linear layers of a model or a pipeline, putting stock layers back, and telling what was done."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from dma_diffusers.components import device_of, transformers_of
from dma_diffusers.finetune.module import QuartetLinear
from dma_diffusers.kernels.linears.groups import Groups
from dma_diffusers.kernels.linears.lowering import choose as choose_lowering
from dma_diffusers.kernels.linears.weight import LinearWeight, quantise
from dma_diffusers.kernels.lowerings import architecture
from dma_diffusers.linears.calibration import Calibration, observe, run_inputs, run_prompts
from dma_diffusers.linears.exclusions import Choice, choose
from dma_diffusers.linears.methods import CALIBRATED, check_method
from dma_diffusers.linears.module import LastInput, QuantisedLinear
from dma_diffusers.linears.plans import Plan, Target, make_plans
from dma_diffusers.linears.receipt import LinearReceipt
from dma_diffusers.progress import OnStep
from dma_diffusers.progress import progress as progress_of

NEEDS_CALIBRATION = (
    "micromix needs calibration: give quantize_linears(pipe, calibration=prompts), call "
    "dma_diffusers.calibrate_linears(pipe, prompts) first, or load a file that save_linears wrote"
)


@dataclass
class Attachment:
    """A record of the quantised linear layers of one model, kept on the model.

    method: one of `METHODS`, a recipe of fine-tuning, or the file that they were loaded from. stock: the stock layers
    by name; empty if they were not kept, and where a recipe shares their parameters. kept, left: as in
    `exclusions.Choice`. plans: the plan of each layer. samples: some numbers of each stock weight. over_time: the
    shares of bits at each noise level, as `Calibration.over_time` gives them; None without thresholds. of_file: what
    the header of the file says of the model; None without a file.
    """

    method: str
    layers: tuple[str, ...]
    kept: dict[str, str]
    left: dict[str, str]
    keeps_original: bool
    stock: dict[str, torch.nn.Linear] = field(default_factory=dict)
    samples: dict[str, torch.Tensor] = field(default_factory=dict)
    plans: dict[str, Plan] = field(default_factory=dict)
    over_time: dict[str, Any] | None = None
    of_file: dict[str, Any] | None = None


def quantize_linears(
    pipe_or_model: Any,
    method: str = "micromix",
    *,
    calibration: Any = None,
    bits: float | None = None,
    groups: Mapping[str, Groups] | None = None,
    modules: Collection[str] | None = None,
    skip: Collection[str] = (),
    sensitive: bool = True,
    keep_original: bool = True,
    lowering: str = "auto",
    call: Mapping[str, Any] | None = None,
    progress: bool | OnStep = True,
) -> None:
    """Quantises weights and inputs of the linear layers in the blocks of a transformer, or of those of a pipeline.

    Left alone, with the reason in `report`: embedders, norms and modulation, the final projection, layers that are
    quantised already by something else, and widths that are no multiple of 32. Layers that read the same tensor share
    what was quantised, and have one permutation.

    Args:
        pipe_or_model: a Diffusers pipeline or transformer.
        method: "fp8", "int8", "mxfp8", "mxfp4", "nvfp4": the format of every channel. "micromix": 4, 6 or 8 bits for
            each channel by calibration (arXiv 2508.02343).
        calibration: for a pipeline, prompts like those to be drawn; for a model, forward inputs (each a dict, a tuple,
            or one argument), or a function without arguments that runs it; None for that of `calibrate_linears`, if it
            ran before. "micromix" needs one. "fp8" gets one fixed scale for each input from it, which is faster;
            without it, each row is measured.
        bits: the average bits of a weight for "micromix", scales of blocks included (4.25 to 8.25): thresholds are
            multiplied by what meets it.
        groups: the groups of single layers by name, in the place of the method's.
        modules: names of layers to take alone, with `*` for any text.
        skip: names of layers to leave alone, with `*` for any text.
        sensitive: keeps parts that published work found sensitive at more bits (`linears.exclusions.SENSITIVE`).
        keep_original: keeps the stock layers in the CPU's memory for `restore`, which needs them.
        lowering: "auto", or one of `kernels.linears.lowering` for all layers.
        call: further arguments of the pipeline's call for calibration, which takes 8 steps unless they say otherwise.
        progress: whether a bar is shown on a terminal; or a function, called with a title, steps done and steps in all.

    Raises:
        ValueError: where linears are quantised already, where nothing is left to quantise, for a method, a lowering,
            `bits` or names that can't be had, for calibration without prompts, and for NaN during calibration, which it
            names with layer and prompt. Nothing is changed then.

    Examples:
        >>> quantize_linears(pipe, "fp8", calibration=["a red apple left of a cat"])
    """
    check_method(method)
    if calibration is not None and method not in CALIBRATED:
        raise ValueError(f"calibration is for {' and '.join(CALIBRATED)}, not for {method}: leave it out")
    if bits is not None and method != "micromix":
        raise ValueError(f"bits is for micromix, not for {method}: leave it out")
    targets = _targets(pipe_or_model, modules, skip, sensitive)
    with progress_of(progress) as on_step:
        if calibration is not None:
            _calibrate(pipe_or_model, targets, calibration, call or {}, on_step)
        elif method in CALIBRATED:
            for target in targets:
                target.seen = _stored_calibration(target.model)
        if method == "micromix" and not all(target.seen for target in targets):
            raise ValueError(NEEDS_CALIBRATION)
        make_plans(targets, method, bits, groups or {})
        for target in targets:
            _check_lowering(target, lowering)
        done, total = 0, sum(len(target.choice.layers) for target in targets)
        for target in targets:
            choice = target.choice
            record = Attachment(
                method,
                tuple(choice.layers),
                choice.kept,
                choice.left,
                keep_original,
                over_time=target.over_time,
            )
            with attaching(target.model, record) as attach:
                for name in choice.layers:
                    attach(name, choice, target.plans[name], lowering, None)
                    done += 1
                    on_step("quantising linear layers", done, total)


def calibrate_linears(
    pipe_or_model: Any,
    calibration: Any,
    *,
    call: Mapping[str, Any] | None = None,
    progress: bool | OnStep = True,
) -> dict[str, Calibration]:
    """Observes the inputs of linear layers and keeps that on the models, for each `quantize_linears` with "micromix".

    Args:
        pipe_or_model: a Diffusers pipeline or transformer, whose linear layers are not quantised yet.
        calibration: prompts or inputs, as in `quantize_linears`.
        call: further arguments of the pipeline's call, as in `quantize_linears`.
        progress: a bar or a function, as in `quantize_linears`.

    Returns:
        What was observed, by the prefix of module names.

    Raises:
        ValueError: as `quantize_linears` does.

    Examples:
        >>> calibrate_linears(pipe, ["a red apple left of a cat", "a blue car"])
        >>> quantize_linears(pipe, "micromix", bits=5.0)
    """
    targets = _targets(pipe_or_model, None, (), sensitive=False)
    with progress_of(progress) as on_step:
        _calibrate(pipe_or_model, targets, calibration, call or {}, on_step)
    return {target.prefix: target.seen for target in targets if target.seen}


def is_calibrated(pipe_or_model: Any) -> bool:
    """Tells whether calibration of every transformer is at hand, so that "micromix" needs no other."""
    return all(_stored_calibration(model) for _, model in quantisable(pipe_or_model))


def restore_linears(pipe_or_model: Any) -> None:
    """Puts the very same stock layers back; it does nothing where nothing is quantised.

    Raises ValueError where they were not kept.
    """
    check_restorable(pipe_or_model)
    for _, model in quantisable(pipe_or_model):
        if record := attachment_of(model):
            _put_back(model, record)


def check_restorable(pipe_or_model: Any) -> None:
    """Raises ValueError where linear layers are quantised and the stock ones were not kept."""
    for _, model in quantisable(pipe_or_model):
        record = attachment_of(model)
        if record and not record.keeps_original:
            raise ValueError(
                f"the stock linear layers of {type(model).__name__} were not kept (keep_original=False): load the model"
            )


def attachment_of(model: torch.nn.Module) -> Attachment | None:
    """The record of a model's quantised linear layers; None if there are none."""
    return getattr(model, "_dma_linears", None)


def linear_receipts(prefix: str, model: torch.nn.Module) -> Iterator[LinearReceipt]:
    """The receipts of a model's linear layers; none where nothing is quantised."""
    record = attachment_of(model)
    if record is None:
        return
    for name in record.layers:
        layer = layer_of(model, name)
        if isinstance(layer, QuantisedLinear):
            yield _receipt(prefix + name, layer, device_of(model, layer), record.kept.get(name, ""))
        elif not isinstance(layer, QuartetLinear):  # which has a receipt as such
            yield _left(prefix + name, "another layer was put in its place after it was quantised")
    for name, reason in record.left.items():
        yield _left(prefix + name, reason)


def quantisable(pipe_or_model: Any) -> list[tuple[str, torch.nn.Module]]:
    """(prefix, model) of the transformers whose linear layers are quantised; ControlNets keep theirs."""
    return [
        (prefix, model)
        for prefix, model in transformers_of(pipe_or_model)
        if not prefix or prefix.startswith("transformer")
    ]


def layer_of(model: torch.nn.Module, name: str) -> torch.nn.Module:
    """The linear layer of this name, inside a LoRA wrapper if there is one."""
    layer = model.get_submodule(name)
    return getattr(layer, "base_layer", layer)  # type: ignore[return-value]


@contextmanager
def attaching(
    model: torch.nn.Module, record: Attachment
) -> Iterator[Callable[[str, Choice, Plan, str, LinearWeight | None], None]]:
    """Yields a function that puts one quantised layer into its place.

    Where something fails, all are put back; without the stock ones, the record has those that were quantised.

    It takes the name of the layer, the choice that has it, its plan, a lowering, and the weight if a file has that.
    The weight is quantised on the device where the layer will run, and stays where the layer is.
    """
    last: dict[str, LastInput] = {}
    shares: dict[tuple, int] = {}

    def attach(name: str, choice: Choice, plan: Plan, lowering: str, weight: LinearWeight | None) -> None:
        stock, block = choice.layers[name], choice.blocks[name]
        home = stock.weight.device
        if weight is None:
            record.samples[name] = sample_of(stock.weight)
            weight = _quantised(stock.weight, plan, device_of(model, stock))
        # A layer without weights, on the meta device, says nothing about where it will run.
        home = torch.device("cpu") if home.type == "meta" else home
        weight = LinearWeight.from_tensors(plan.groups, {n: x.to(home) for n, x in weight.tensors().items()})
        scale = None if plan.input_scale is None else torch.tensor(plan.input_scale, device=home)
        layer = QuantisedLinear(stock, weight, scale, lowering)
        # Numbers are small and alike in all blocks, for blocks that are compiled once.
        alike = (block, plan.shared, plan.groups, tuple(layer.lowerings.items()))
        in_block = sum(1 for taken in shares if taken[0] == block)
        layer.last, layer.keeps = last.setdefault(block, LastInput()), plan.keeps
        layer.share = shares.setdefault(alike, in_block)
        record.plans[name] = plan
        set_layer(model, name, layer)
        if record.keeps_original:
            record.stock[name] = stock.to("cpu") if stock.weight.device.type != "meta" else stock

    model._dma_linears = record  # type: ignore[assignment]  # an attribute like any other
    try:
        yield attach
    except BaseException:
        if record.keeps_original or not record.plans:
            _put_back(model, record)
        else:
            record.layers = tuple(record.plans)
        raise


def set_layer(model: torch.nn.Module, name: str, layer: torch.nn.Module) -> None:
    """Puts a layer into the place of the one of this name, inside a LoRA wrapper if there is one."""
    parent, _, own = name.rpartition(".")
    holder = model.get_submodule(name)
    if hasattr(holder, "base_layer"):
        holder.base_layer = layer
    else:
        setattr(model.get_submodule(parent), own, layer)


def sample_of(weight: torch.Tensor) -> torch.Tensor:
    """Sixteen numbers of a weight, float32 on the CPU, by which another model's is told."""
    numbers = weight.detach().flatten()
    return numbers[:: max(len(numbers) // 16, 1)][:16].float().cpu()


def _targets(
    pipe_or_model: Any, modules: Collection[str] | None, skip: Collection[str], sensitive: bool
) -> list[Target]:
    targets = []
    for prefix, model in quantisable(pipe_or_model):
        kind = type(model).__name__
        check_not_quantised(model)
        choice = choose(model, modules, skip, sensitive)
        if not choice.layers:
            reasons = "; ".join(sorted(set(choice.left.values()))) or "it has none"
            raise ValueError(f"{kind} has no linear layer to quantise: {reasons}")
        targets.append(Target(prefix, model, choice))
    return targets


def check_not_quantised(model: torch.nn.Module) -> None:
    """Raises ValueError where linear layers are quantised already, or where something else moves their weights."""
    kind = type(model).__name__
    if attachment_of(model):
        raise ValueError(
            f"the linear layers of {kind} are quantised already: call dma_diffusers.restore first"
        )
    if any(_is_offloaded(module) for module in model.modules()):
        raise ValueError(f"the weights of {kind} are offloaded in groups: quantise before that is enabled")


def _is_offloaded(module: torch.nn.Module) -> bool:
    hooks: Any = getattr(module, "_diffusers_hook", None)
    return hooks is not None and hooks.get_hook("group_offloading") is not None


@torch.no_grad()
def _calibrate(
    pipe_or_model: Any, targets: Sequence[Target], calibration: Any, call: Mapping[str, Any], on_step: OnStep
) -> None:
    """Observes the models while they run on what calibration is; the result is kept on them, too."""
    running = ""

    def says(what: str) -> None:
        nonlocal running
        running = what

    with ExitStack() as observing:
        for target in targets:
            choice = target.choice
            target.seen = observing.enter_context(
                observe(target.model, choice.layers, choice.blocks, lambda: running)
            )
        if isinstance(pipe_or_model, torch.nn.Module) or callable(calibration):
            run_inputs(pipe_or_model, calibration, says, on_step)
        else:
            run_prompts(pipe_or_model, calibration, call, says, on_step)
    for target in targets:
        if not (target.seen and target.seen.readers):
            raise ValueError(f"calibration ran no linear layer of {type(target.model).__name__}")
        target.model._dma_calibration = target.seen  # type: ignore[assignment]  # an attribute like any other


def _stored_calibration(model: torch.nn.Module) -> Calibration | None:
    return getattr(model, "_dma_calibration", None)


def _check_lowering(target: Target, lowering: str) -> None:
    """Raises ValueError, naming the layer, where the lowering can't run one, or a weight is not at hand."""
    for name, layer in target.choice.layers.items():
        if layer.weight.device.type == "meta":
            raise ValueError(
                f"{name} has no weight yet: quantise before weights are offloaded, or load a file"
            )
        runs_on = architecture(device_of(target.model, layer))
        try:
            choose_lowering(runs_on, target.plans[name].groups, lowering, layer.out_features)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


@torch.no_grad()
def _quantised(weight: torch.Tensor, plan: Plan, device: torch.device) -> LinearWeight:
    return quantise(weight.to(device), plan.groups, plan.permutation, one_scale=plan.input_scale is not None)


def _put_back(model: torch.nn.Module, record: Attachment) -> None:
    for name in record.layers:
        now = layer_of(model, name)
        if isinstance(now, QuartetLinear):
            set_layer(model, name, now.stock())
        elif isinstance(now, QuantisedLinear) and name in record.stock:
            set_layer(model, name, record.stock[name].to(now.like.device, now.like.dtype))
    del model._dma_linears


def _receipt(name: str, layer: QuantisedLinear, device: torch.device, kept: str) -> LinearReceipt:
    try:
        chosen = layer.choice(device)
        lowering, reason = chosen.lowering, chosen.reason
    except ValueError as error:
        lowering, reason = "none", str(error)
    before = layer.in_features * layer.out_features * layer.like.element_size()
    weight = layer.quantised
    return LinearReceipt(
        name, layer.groups.formats, layer.groups.widths, layer.groups.average_bits, lowering, reason,
        architecture(device), kept, before, weight.bytes,
    )  # fmt: skip


def _left(name: str, reason: str) -> LinearReceipt:
    return LinearReceipt(name, (), (), 0.0, "stock", reason, "")
