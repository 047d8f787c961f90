"""This module names the linear layers of a model that are worth 8 bits: those of its repeated blocks."""

from torch import nn

_MULTIPLE = 16  # torch._scaled_mm takes sides of such lengths alone
# Layers of such names make shifts and scales of the timestep: they have one row of input.
_MODULATION = ("norm", "mod", "img_mod", "txt_mod")


def linears_of_blocks(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers, by name, of a model's repeated blocks that see every token; embedders have none."""
    return {
        f"{block_name}.{name}": module
        for block_name, block in model.named_modules()
        if type(block).__name__ in model._repeated_blocks
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
        and not any(part.startswith(_MODULATION) for part in name.split("."))
        and "embed" not in block_name
        and not any(side % _MULTIPLE for side in module.weight.shape)
    }
