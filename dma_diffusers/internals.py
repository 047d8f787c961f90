"""Everything private in Diffusers and PyTorch that this package needs, checked when it is imported.

Neither library promises to keep these names, so a version that lacks one is told here, by its number.
"""

import diffusers
import torch

try:
    from diffusers.hooks._helpers import AttentionProcessorRegistry
    from diffusers.hooks.hooks import StateManager
    from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode
    from diffusers.models.attention_dispatch import (
        AttentionBackendName,
        _AttentionBackendRegistry,
        dispatch_attention_fn,
    )
    from diffusers.models.attention_dispatch import (
        _templated_context_parallel_attention as context_parallel_attention,
    )
    from diffusers.models.embeddings import apply_rotary_emb
    from diffusers.models.normalization import RMSNorm as DiffusersRMSNorm
    from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxPosEmbed
    from diffusers.models.transformers.transformer_qwenimage import (
        QwenDoubleStreamAttnProcessor2_0,
        apply_rotary_emb_qwen,
    )

    # PyTorch's own, whatever another package has put into `torch.nn.functional` in its place.
    from torch._C._nn import scaled_dot_product_attention
    from torch.overrides import _get_current_function_mode_stack as function_modes

    _ = torch.compiler._is_exporting_flag
    may_overlap = torch._debug_has_internal_overlap
    number_of_backward = torch._C._current_graph_task_id
    active_backend = _AttentionBackendRegistry.get_active_backend
    has_context_parallelism = _AttentionBackendRegistry._is_context_parallel_available
except (ImportError, AttributeError) as error:
    raise ImportError(
        f"dma-diffusers does not know diffusers {diffusers.__version__} with torch {torch.__version__}: {error}; "
        "install versions that its pyproject.toml names, or a newer dma-diffusers"
    ) from error

# Modules whose torch function modes leave attention as it is: `with torch.device(...)`, tracing, exporting.
HARMLESS_MODES = ("torch.utils._device", "torch.export.", "torch._export.", "torch.fx.", "torch._subclasses.")


def is_exporting() -> bool:
    """Says whether torch.export runs; graphs of PyTorch 2.11 take `torch.compiler.is_exporting()` for true."""
    return torch.compiler._is_exporting_flag


def runs_backward() -> bool:
    """Says whether this thread is in a backward pass, as what a gradient checkpoint runs anew is."""
    return number_of_backward() != -1


__all__ = [
    "HARMLESS_MODES",
    "AttentionBackendName",
    "AttentionProcessorRegistry",
    "AttentionScoreSkipFunctionMode",
    "DiffusersRMSNorm",
    "FluxAttnProcessor",
    "FluxPosEmbed",
    "QwenDoubleStreamAttnProcessor2_0",
    "StateManager",
    "active_backend",
    "apply_rotary_emb",
    "apply_rotary_emb_qwen",
    "context_parallel_attention",
    "dispatch_attention_fn",
    "function_modes",
    "has_context_parallelism",
    "is_exporting",
    "may_overlap",
    "runs_backward",
    "scaled_dot_product_attention",
]
