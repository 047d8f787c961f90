"""DMA attention on a model or a pipeline: apply, restore, report."""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from dma_diffusers.bind import Bound, bind
from dma_diffusers.config import DMAConfig
from dma_diffusers.dense import dense_parts
from dma_diffusers.divert import Diversion, Forward
from dma_diffusers.families import family_of
from dma_diffusers.processor import DMAAttnProcessor
from dma_diffusers.receipt import ModuleReceipt, Receipt

logger = logging.getLogger("dma_diffusers")


@dataclass
class Attachment:
    """What `apply` did to one model; kept on the model."""

    roles: dict[str, str]  # modules that keep their stock processor, and why
    hook: RemovableHandle


def apply(pipe_or_model: Any, config: DMAConfig | None = None, **fields) -> None:
    """Diverts the attention of a transformer, or of every transformer of a pipeline.

    pipe_or_model: a Diffusers pipeline or transformer; of a pipeline, only its transformers change.
    config: a `DMAConfig` (None: the default), with `fields` of one changed.
    Applying again replaces what was applied. Calls that DMA does not take run on PyTorch's own attention; an
    attention backend that was chosen before runs only where whole modules are left to stock.

    Raises ValueError for a pipeline without a transformer, a model of no known family without `text`,
    `dense_layers` or `modules` that do not exist, `quality_first` where nothing is known of it, a configuration for
    another model, a policy that needs a grid which is not known, or context parallelism.
    """
    config = DMAConfig.of(config, **fields)
    for attach in [_prepare(model, config) for _, model in transformers_of(pipe_or_model)]:
        attach()


def check(pipe_or_model: Any, configurations: Mapping[str, DMAConfig]) -> None:
    """Raises the ValueError that `apply` would for one of them, beginning with its name; changes nothing."""
    for name, config in configurations.items():
        try:
            for _, model in transformers_of(pipe_or_model):
                _prepare(model, config)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def restore(pipe_or_model: Any) -> None:
    """Puts the very same stock processors back."""
    for _, model in transformers_of(pipe_or_model):
        _detach(model)


def report(pipe_or_model: Any) -> Receipt:
    """What each attention module runs, and why; no modules where nothing is applied."""
    receipts = []
    for prefix, model in transformers_of(pipe_or_model):
        if attachment := _attachment(model):
            receipts.extend(_receipts(prefix, model, attachment))
    return Receipt(tuple(receipts))


def diversions(model: torch.nn.Module) -> dict[str, Diversion]:
    """The diversions of a model's attention modules, by name; empty where nothing is applied."""
    found = _attention_modules(_uncompiled(model))
    return {name: module.processor.diversion for name, module in found if isinstance(module.processor, Bound)}


def set_attn_processor(model: torch.nn.Module, processor: Any, stock_method: Callable) -> None:
    """A model's `set_attn_processor`, which takes a `DMAAttnProcessor` too, alone or in a dict."""
    if isinstance(processor, DMAAttnProcessor):
        return apply(model, processor.config)
    given = processor if isinstance(processor, dict) else {"": processor}
    asked = {name: value.config for name, value in given.items() if isinstance(value, DMAAttnProcessor)}
    if asked:
        if len(set(asked.values())) > 1:
            raise ValueError("the DMAAttnProcessors of one model must agree on their configuration")
        chosen = {name.removesuffix(".processor") for name in asked}
        attach = _prepare(model, next(iter(asked.values())), chosen)
        _detach(model)
        stock = model.attn_processors
        stock_method(model, {name: stock[name] if name in asked else value for name, value in given.items()})
        return attach()
    stock_method(model, processor)
    if _attachment(model) and not any(isinstance(m.processor, Bound) for _, m in _attention_modules(model)):
        _detach(model)
        logger.warning("set_attn_processor removed DMA attention from %s", type(model).__name__)


def transformers_of(pipe_or_model: Any) -> list[tuple[str, torch.nn.Module]]:
    """(prefix of module names, model) of a model or of each transformer of a pipeline.

    Raises TypeError for anything else, ValueError for a pipeline without a transformer.
    """
    if isinstance(pipe_or_model, torch.nn.Module):
        return [("", _uncompiled(pipe_or_model))]
    components = getattr(pipe_or_model, "components", None)
    if not isinstance(components, dict):
        kind = type(pipe_or_model).__name__
        raise TypeError(f"expected a Diffusers pipeline or a transformer, got {kind}")
    found = [
        (f"{name}.", _uncompiled(component))
        for name, component in components.items()
        if name.startswith("transformer") and isinstance(component, torch.nn.Module)
    ]
    if not found:
        raise ValueError(f"{type(pipe_or_model).__name__} has no transformer")
    return found


def _uncompiled(model: torch.nn.Module) -> torch.nn.Module:
    return getattr(model, "_orig_mod", model)


def _attention_modules(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    return [(name, m) for name, m in model.named_modules() if callable(getattr(m, "processor", None))]


def _attachment(model: torch.nn.Module) -> Attachment | None:
    return getattr(model, "_dma_attachment", None)


def _prepare(model: torch.nn.Module, config: DMAConfig, chosen: set[str] | None = None) -> Callable[[], None]:
    """Checks that `config` can be applied to `model`, or to its modules `chosen`; the result does it."""
    family = family_of(model, config.text, config.grid)
    parallel = getattr(model, "_parallel_config", None)
    if getattr(parallel, "context_parallel_config", None) is not None:
        raise ValueError("DMA attention does not support context parallelism")

    roles = {}
    wrapped = []
    for name, _ in _attention_modules(model):
        if chosen is not None and name not in chosen:
            roles[name] = "not asked for"
        elif role := family.role_left_to_stock(name):
            roles[name] = role
        else:
            wrapped.append(name)
    if not wrapped:
        raise ValueError(f"{type(model).__name__} has no attention module to divert")
    diverted = [name for name, _ in _attention_modules(model) if not family.role_left_to_stock(name)]
    _check_modules(model, config, diverted)
    dense = dense_parts(config, family, type(model).__name__, tuple(diverted))
    if dense.above_sigma is not None and family.timestep_scale is None:
        raise ValueError(f"dense_above_sigma: the scale of {type(model).__name__}'s timestep is not known")
    policies = [config.of_module(name).asked for name in wrapped if name not in dense.modules]
    on_grid = [policy for policy in policies if policy.on_grid]
    if on_grid and family.grid is None:
        raise ValueError(
            f"{on_grid[0]} needs to know what the tokens of {type(model).__name__} lie on: "
            "say so, with grid=(rows, columns) or (frames, rows, columns)"
        )

    def attach() -> None:
        _detach(model)
        forward = Forward(model, family, dense.above_sigma, bool(on_grid), dense.note)
        for name in wrapped:
            module = model.get_submodule(name)
            own = config.of_module(name)
            diversion = Diversion(own, family, forward, name in dense.modules, _head_dim(module))
            module.processor = bind(module.processor, diversion)
        hook = model.register_forward_pre_hook(forward.hook, with_kwargs=True)
        model._dma_attachment = Attachment(roles, hook)
        if dense.note:
            logger.info("%s: %s", type(model).__name__, dense.note)

    return attach


def _check_modules(model: torch.nn.Module, config: DMAConfig, diverted: list[str]) -> None:
    """Raises ValueError where `config` has modules or heads that `model` has not, or is for another model."""
    kind, named = type(model).__name__, {name for name, _ in config.modules}
    if config.model not in (None, kind):
        raise ValueError(f"this configuration is for {config.model}, not for {kind}: calibrate it for that")
    if config.model and (differing := named.symmetric_difference(diverted)):
        raise ValueError(f"this configuration is for another {kind}: only one of them has {min(differing)}")
    if absent := named.difference(diverted):
        raise ValueError(f"modules: {kind} has no {min(absent)} to divert")
    for name in diverted:
        asked, heads = config.of_module(name).asked.heads, getattr(model.get_submodule(name), "heads", None)
        if None not in (asked, heads) and asked != heads:
            raise ValueError(f"{name} has {heads} heads, and this configuration windows for {asked}")


def _head_dim(module: torch.nn.Module) -> int | None:
    """head_dim where the module tells it; its first call does otherwise."""
    try:
        return module.inner_dim // module.heads
    except AttributeError:
        return None


def _detach(model: torch.nn.Module) -> None:
    if attachment := _attachment(model):
        attachment.hook.remove()
        del model._dma_attachment
    for _, module in _attention_modules(model):
        if isinstance(module.processor, Bound):
            module.processor = module.processor.stock


def _receipts(prefix: str, model: torch.nn.Module, attachment: Attachment) -> Iterator[ModuleReceipt]:
    for name, module in _attention_modules(model):
        if isinstance(module.processor, Bound):
            device = next(module.parameters()).device
            yield module.processor.diversion.receipt(prefix + name, device)
        else:
            reason = attachment.roles.get(name, "its processor was replaced after DMA was applied")
            yield ModuleReceipt(prefix + name, "stock", reason=reason)
