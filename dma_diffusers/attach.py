"""DMA attention on a model or a pipeline: apply, restore, report."""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.utils.hooks import RemovableHandle

from dma_diffusers.config import DMAConfig
from dma_diffusers.dense import dense_parts
from dma_diffusers.families import family_of
from dma_diffusers.forward import ForwardContext
from dma_diffusers.interception import Interception
from dma_diffusers.parallel import Spread
from dma_diffusers.receipt import ModuleReceipt, Receipt
from dma_diffusers.wrap import WrappedProcessor, wrap

logger = logging.getLogger("dma_diffusers")


@dataclass
class Attachment:
    """A record of what `apply` did to one model, kept on the model."""

    roles: dict[str, str]  # modules that keep their stock processor, and why
    hook: RemovableHandle


def apply(pipe_or_model: Any, config: DMAConfig | None = None, **fields) -> None:
    """Intercepts the attention of a transformer, or of every transformer of a pipeline.

    pipe_or_model: a Diffusers pipeline or transformer; of a pipeline, only its transformers change.
    config: a `DMAConfig` (None: the default), with `fields` of one changed.
    Applying again replaces what was applied. Attention operations that DMA does not take run on PyTorch's own
    attention; an attention backend that was chosen before runs only where whole calls of a module fall back.

    Raises ValueError for a pipeline without a transformer, a model of no known family without `text`,
    `dense_layers` or `modules` that do not exist, `quality_first` where nothing is known of it, a configuration for
    another model, or a policy that needs a grid which is not known, or is spread over a ring of GPUs.
    """
    config = DMAConfig.of(config, **fields)
    for attach in [prepare(model, config) for _, model in transformers_of(pipe_or_model)]:
        attach()


def check(pipe_or_model: Any, configurations: Mapping[str, DMAConfig]) -> None:
    """Raises the ValueError that `apply` would for one of them, beginning with its name; changes nothing."""
    for name, config in configurations.items():
        try:
            for _, model in transformers_of(pipe_or_model):
                prepare(model, config)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def restore(pipe_or_model: Any) -> None:
    """Puts the very same stock processors back."""
    for _, model in transformers_of(pipe_or_model):
        _detach(model)


def report(pipe_or_model: Any) -> Receipt:
    """The receipt: what each attention module runs, and why; it has no modules where nothing is applied."""
    receipts: list[ModuleReceipt] = []
    for prefix, model in transformers_of(pipe_or_model):
        if attachment := _attachment(model):
            receipts.extend(_receipts(prefix, model, attachment))
    return Receipt(tuple(receipts))


def interceptions(model: torch.nn.Module) -> dict[str, Interception]:
    """The interceptions of a model's attention modules, by name; empty where nothing is applied."""
    found = [(name, module.processor) for name, module in _attention_modules(_uncompiled(model))]
    return {name: each.interception for name, each in found if isinstance(each, WrappedProcessor)}


def is_overwritten(model: torch.nn.Module) -> bool:
    """Tells whether DMA was applied to `model`, and all of its processors were replaced since."""
    wrapped = any(isinstance(module.processor, WrappedProcessor) for _, module in _attention_modules(model))
    return _attachment(model) is not None and not wrapped


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


def prepare(model: torch.nn.Module, config: DMAConfig, chosen: set[str] | None = None) -> Callable[[], None]:
    """Checks that `config` can be applied to `model`, or to its modules `chosen`; the function it gives applies it.

    Raises ValueError as `apply` does.
    """
    family = family_of(model, config.text, cast(tuple[int, ...] | None, config.grid))
    roles = {}
    wrapped = []
    for name, _ in _attention_modules(model):
        if chosen is not None and name not in chosen:
            roles[name] = "not asked for"
        elif role := family.stock_role(name):
            roles[name] = role
        else:
            wrapped.append(name)
    if not wrapped:
        raise ValueError(f"{type(model).__name__} has no attention module to intercept")
    eligible = [name for name, _ in _attention_modules(model) if not family.stock_role(name)]
    _check_modules(model, config, eligible)
    dense = dense_parts(config, family, type(model).__name__, tuple(eligible))
    if dense.above_sigma is not None and family.timestep_scale is None:
        raise ValueError(f"dense_above_sigma: the scale of {type(model).__name__}'s timestep is not known")
    policies = [config.of_module(name).asked for name in wrapped if name not in dense.modules]
    if spread := Spread.of(getattr(model, "_parallel_config", None)):
        spread.check(policies)
    on_grid = [policy for policy in policies if policy.on_grid]
    if on_grid and family.grid is None:
        raise ValueError(
            f"{on_grid[0]} needs to know what the tokens of {type(model).__name__} lie on: "
            "say so, with grid=(rows, columns) or (frames, rows, columns)"
        )

    def attach() -> None:
        _detach(model)
        forward = ForwardContext(model, family, dense.above_sigma, bool(on_grid), dense.note)
        for name in wrapped:
            module: Any = model.get_submodule(name)
            own = config.of_module(name)
            interception = Interception(own, family, forward, name in dense.modules, _head_dim(module))
            module.processor = wrap(module.processor, interception)
        hook = model.register_forward_pre_hook(forward.hook, with_kwargs=True)
        model._dma_attachment = Attachment(roles, hook)  # type: ignore[assignment]  # an attribute like any other
        if dense.note:
            logger.info("%s: %s", type(model).__name__, dense.note)

    return attach


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
        asked, heads = config.of_module(name).asked.heads, getattr(model.get_submodule(name), "heads", None)
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
        attachment.hook.remove()
        del model._dma_attachment
    for _, module in _attention_modules(model):
        if isinstance(module.processor, WrappedProcessor):
            module.processor = module.processor.stock


def _receipts(prefix: str, model: torch.nn.Module, attachment: Attachment) -> Iterator[ModuleReceipt]:
    for name, module in _attention_modules(model):
        if isinstance(module.processor, WrappedProcessor):
            device = next(module.parameters()).device
            yield module.processor.interception.receipt(prefix + name, device)
        else:
            reason = attachment.roles.get(name, "its processor was replaced after DMA was applied")
            yield ModuleReceipt(prefix + name, "stock", reason=reason)
