"""DMA attention on a model or a pipeline: apply, restore, report."""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch.utils.hooks import RemovableHandle

from dma_diffusers.checkpoints import let_go
from dma_diffusers.components import (
    attention_modules,
    device_of,
    transformers_of,
    unwrapped,
    without_processor,
)
from dma_diffusers.config import DMAConfig
from dma_diffusers.decision import NOT_RUNNING
from dma_diffusers.families import family_of, known_family
from dma_diffusers.finetune.receipts import trained_receipts
from dma_diffusers.fingerprint import OTHER_WEIGHTS, are_other_weights
from dma_diffusers.forward import ForwardContext
from dma_diffusers.guard import Guard
from dma_diffusers.interception import Interception
from dma_diffusers.linears.apply import prepare_linears
from dma_diffusers.linears.quantise import linear_receipts, restore_linears
from dma_diffusers.linears.receipt import LinearReceipt
from dma_diffusers.memory import ModuleMemory
from dma_diffusers.parallel import Spread
from dma_diffusers.receipt import ModuleReceipt, Receipt
from dma_diffusers.stages import stages
from dma_diffusers.unmet import reason_in_graphs
from dma_diffusers.wrap import WrappedProcessor, wrap

logger = logging.getLogger("dma_diffusers")

UNSEEN = "no call was seen: other processors stood in the place of these, or a compiled graph ran them"


@dataclass
class Attachment:
    """A record of what `apply` did to one model, kept on the model.

    config: what was asked for. chosen: the modules that it was asked for; None for all of them.
    roles: the reason for which each module keeps its stock processor; empty if it does not. forward: None for a model
    that keeps them all.
    """

    config: DMAConfig
    chosen: set[str] | None
    roles: dict[str, str]
    forward: ForwardContext | None
    hooks: tuple[RemovableHandle, ...] = ()


def apply(pipe_or_model: Any, config: DMAConfig | None = None, **fields: Any) -> None:
    """Intercepts the attention of a transformer, or of every transformer and ControlNet of a pipeline.

    Applying again replaces what was applied. Attention operations that DMA does not take run on PyTorch's own
    attention; an attention backend that was chosen before runs only where whole calls of a module fall back. Components
    of a pipeline that are not called `transformer…`, such as ControlNets, stay as they are where the configuration
    can't be had; the receipt says why.

    Args:
        pipe_or_model: a Diffusers pipeline or transformer; of a pipeline, nothing else changes.
        config: what to apply (None: the default). Its `linears` quantise the linear layers of transformers, too;
            without them, linear layers stay as they are.
        **fields: fields of `DMAConfig` that are to be other than in `config`.

    Raises:
        ValueError: for a pipeline without a transformer, a model that can't have DMA, or of no known family without
            `text`, for `dense_layers` or `modules` that do not exist, `quality_first` where nothing is known of it, a
            configuration for another model, a policy that needs a grid which is not known, or is spread over a ring of
            GPUs, or a processor that is none, or `linears` that can't be had (as `quantize_linears` and `load_linears`
            do). Nothing is changed then.

    Examples:
        >>> apply(pipe)
        >>> apply(pipe, DMAConfig.preset("auto"))
        >>> apply(pipe, policy="importance(budget=0.05)", low="nvfp4")
    """
    config = DMAConfig.of(config, **fields)
    attaching, quantise = _prepare_all(pipe_or_model, config), prepare_linears(pipe_or_model, config.linears)
    quantise()
    for attach in attaching:
        attach()


def check(pipe_or_model: Any, configurations: Mapping[str, DMAConfig]) -> None:
    """Raises the ValueError that `apply` would for one of them, beginning with its name; changes nothing."""
    for name, config in configurations.items():
        try:
            _prepare_all(pipe_or_model, config)
            prepare_linears(pipe_or_model, config.linears)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def restore(pipe_or_model: Any) -> None:
    """Puts the very same stock processors and linear layers back; it does nothing where nothing is applied.

    Args:
        pipe_or_model: what DMA was applied to.

    Raises:
        ValueError: where linear layers were not kept.

    Examples:
        >>> restore(pipe)
    """
    restore_linears(pipe_or_model)
    restore_attention(pipe_or_model)


def restore_attention(pipe_or_model: Any) -> None:
    """Puts the very same stock processors back, and leaves linear layers as they are."""
    for _, model in transformers_of(pipe_or_model):
        _detach(model)


def report(pipe_or_model: Any) -> Receipt:
    """The receipt: what each attention module and linear layer runs, and why; it is empty where nothing is applied.

    Args:
        pipe_or_model: a pipeline or a transformer.

    Returns:
        The receipt of every module, which prints as a few lines, and is plain data by `to_dict`.

    Examples:
        >>> print(report(pipe))
        >>> report(pipe).to_dict()["modules"][0]["lowering"]
    """
    receipts: list[ModuleReceipt] = []
    linears: list[LinearReceipt] = []
    for prefix, model in transformers_of(pipe_or_model):
        if _attachment(model) or interceptions(model):
            receipts.extend(_with_unseen(list(_receipts(prefix, model, _attachment(model)))))
        linears.extend([*linear_receipts(prefix, model), *trained_receipts(prefix, model)])
    return Receipt(tuple(receipts), tuple(linears))


def interceptions(model: torch.nn.Module) -> dict[str, Interception]:
    """The interceptions of a model's attention modules, by name; empty where nothing is applied."""
    found = [(name, module.processor) for name, module in attention_modules(unwrapped(model))]
    return {name: each.interception for name, each in found if isinstance(each, WrappedProcessor)}


def settle(model: torch.nn.Module, keeps: bool) -> None:
    """Brings DMA into line with processors that others have put on a model.

    keeps: whether modules that got another stock processor keep DMA. Processors of ours that come back run as they did,
    and DMA is removed where none of them is left.
    """
    attachment, found = _attachment(model), interceptions(model)
    stale = [
        each.forward for each in found.values() if not attachment or each.forward is not attachment.forward
    ]
    if attachment and (keeps or stale):
        prepare(model, attachment.config, attachment.chosen if keeps else set(found))()
    elif stale:
        prepare(model, stale[0].config, set(found))()
    elif attachment and not found:
        _detach(model)
        logger.warning("set_attn_processor removed DMA attention from %s", type(model).__name__)


def prepare(model: torch.nn.Module, config: DMAConfig, chosen: set[str] | None = None) -> Callable[[], None]:
    """Checks that `config` can be applied to `model`, or to its modules `chosen`; the function it gives applies it.

    Raises ValueError as `apply` does; so does the function, for a processor that is none.
    """
    if config.text is None and known_family(model) is None and (inside := _known_inside(model)):
        raise ValueError(f"{type(model).__name__} holds a {inside}: apply DMA to that")
    family = family_of(model, config.text, cast(tuple[int, ...] | None, config.grid))
    roles: dict[str, str] = {}
    eligible, intercepted = [], []
    for name, _ in attention_modules(model):
        if role := family.stock_role(name):
            roles[name] = role
            continue
        eligible.append(name)
        asked_for = chosen is None or name in chosen
        roles[name] = "" if asked_for else "not asked for"
        if asked_for:
            intercepted.append(name)
    if not intercepted:
        raise ValueError(f"{type(model).__name__} has no attention module to intercept")
    _check_modules(model, config, eligible)
    found = stages(config, family, type(model).__name__, tuple(eligible))
    if found.above and family.timestep_scale is None:
        field = "schedule" if config.dense_above_sigma is None else "dense_above_sigma"
        raise ValueError(f"{field}: the scale of {type(model).__name__}'s timestep is not known")
    policies = [entry.config.asked for name in intercepted for entry in found.modules[name].entries]
    if spread := Spread.of(getattr(model, "_parallel_config", None)):
        spread.check(policies)
    on_grid = [policy for policy in policies if policy.on_grid]
    if on_grid and family.grid is None:
        raise ValueError(
            f"{on_grid[0]} needs to know what the tokens of {type(model).__name__} lie on: "
            "say so, with grid=(rows, columns) or (frames, rows, columns)"
        )
    others = are_other_weights(model, config.weights)

    def attach() -> None:
        remembers = any(policy.remembers for policy in policies)
        forward = ForwardContext(model, family, config, found, bool(on_grid), remembers)
        forward.notes += [OTHER_WEIGHTS] * others
        guard = None if config.guard is None else Guard(config.guard, forward)
        processors = {}
        for name in intercepted:
            module: Any = model.get_submodule(name)
            seen = family.of_module(name)
            interception = Interception(found.modules[name], seen, forward, _head_dim(module))
            interception.watch = guard.watch(name) if guard else None
            if remembers:  # also where a module's own policy does not, so that compiled blocks share graphs
                interception.memory = ModuleMemory(forward, interception.watch)
            processors[name] = wrap(_stock(module.processor), interception)
        _detach(model)
        for name, processor in processors.items():
            model.get_submodule(name).processor = processor  # type: ignore[assignment]
        hooks = (*forward.watch(model), *(guard.hooks(model) if guard else ()))
        _record(model, Attachment(config, chosen, roles, forward, hooks))
        if found.note:
            logger.info("%s: %s", type(model).__name__, found.note)
        if others:
            logger.warning("%s: %s", type(model).__name__, OTHER_WEIGHTS)

    return attach


def _prepare_all(pipe_or_model: Any, config: DMAConfig) -> list[Callable[[], None]]:
    """`prepare` for each transformer; others of a pipeline may be left as they are."""
    attaching: list[Callable[[], None]] = []
    leaving: list[Callable[[], None]] = []
    for prefix, model in transformers_of(pipe_or_model):
        try:
            attaching.append(prepare(model, config))
        except ValueError as error:
            if not prefix or prefix.startswith("transformer"):
                raise
            refusal = error
            leaving.append(partial(_leave, model, config, str(error)))
    if not attaching:
        raise refusal
    return attaching + leaving


def _known_inside(model: torch.nn.Module) -> str:
    """The class and the place of a model of a known family inside of another module; empty if there is none."""
    inside = ((name, m) for name, m in model.named_modules() if name and known_family(m))
    return next((f"{type(m).__name__} as {name}" for name, m in inside), "")


def _leave(model: torch.nn.Module, config: DMAConfig, reason: str) -> None:
    _detach(model)
    _record(model, Attachment(config, None, {name: reason for name, _ in attention_modules(model)}, None))


def _attachment(model: torch.nn.Module) -> Attachment | None:
    return getattr(model, "_dma_attachment", None)


def _record(model: torch.nn.Module, attachment: Attachment) -> None:
    model._dma_attachment = attachment  # type: ignore[assignment]  # an attribute like any other


def _stock(processor: Any) -> Any:
    return processor.stock if isinstance(processor, WrappedProcessor) else processor


def _check_modules(model: torch.nn.Module, config: DMAConfig, eligible: list[str]) -> None:
    """Raises ValueError where `config` has modules or heads that `model` has not, or is for another model."""
    kind, named = type(model).__name__, set(dict(config.modules))
    if config.model not in (None, kind):
        raise ValueError(f"this configuration is for {config.model}, not for {kind}: calibrate it for that")
    if config.model and (differing := named.symmetric_difference(eligible)):
        raise ValueError(f"this configuration is for another {kind}: only one of them has {min(differing)}")
    if absent := named.difference(eligible):
        raise ValueError(f"modules: {kind} has no {min(absent)} to intercept")
    for name in eligible:
        heads = getattr(model.get_submodule(name), "heads", None)
        for entry in config.of_module(name).entries:
            asked = entry.config.asked.heads
            if None not in (asked, heads) and asked != heads:
                raise ValueError(f"{name} has {heads} heads, and this configuration windows for {asked}")


def _head_dim(module: Any) -> int | None:
    """The head dimension of a module that tells it; None if only its first call will."""
    try:
        return module.inner_dim // module.heads
    except AttributeError:
        return None


def _detach(model: torch.nn.Module) -> None:
    if attachment := _attachment(model):
        for hook in attachment.hooks:
            hook.remove()
        let_go(model)
        del model._dma_attachment
    for _, module in attention_modules(model):
        module.processor = _stock(module.processor)  # type: ignore[assignment]


def _receipts(prefix: str, model: torch.nn.Module, attachment: Attachment | None) -> Iterator[ModuleReceipt]:
    roles = attachment.roles if attachment else {}
    for name, module in attention_modules(model):
        processor = module.processor
        if isinstance(processor, WrappedProcessor):
            receipt = processor.interception.receipt(prefix + name, device_of(model, module))
            if attachment is None or processor.interception.forward is not attachment.forward:
                receipt = replace(receipt, lowering="stock", reason=NOT_RUNNING)
            elif not receipt.intercepted and (
                reason := reason_in_graphs(processor.interception.forward.number, processor.stock)
            ):
                receipt = replace(receipt, lowering="stock", reason=f"in a compiled graph {reason}")
            yield receipt
        else:
            reason = roles.get(name, "it was not there when DMA was applied")
            reason = reason or "its processor was replaced after DMA was applied"
            yield ModuleReceipt(prefix + name, "stock", reason=reason)
    for name in without_processor(model):
        yield ModuleReceipt(prefix + name, "stock", reason="it attends without a processor")


def _with_unseen(receipts: list[ModuleReceipt]) -> list[ModuleReceipt]:
    """The receipts of a model, with a note on modules of which no call was seen though others were called."""
    if not any(receipt.intercepted or receipt.fallbacks for receipt in receipts):
        return receipts
    return [
        replace(receipt, notes=(*receipt.notes, UNSEEN))
        if receipt.policy and not (receipt.intercepted or receipt.fallbacks) and receipt.lowering != "stock"
        else receipt
        for receipt in receipts
    ]
