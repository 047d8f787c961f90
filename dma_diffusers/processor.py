"""`set_attn_processor(DMAAttnProcessor(...))`, the way in that Diffusers users know."""

from functools import wraps

from diffusers.models.attention import AttentionMixin

from dma_diffusers.config import DMAConfig


class DMAAttnProcessor:
    """Asks a model for DMA attention: `model.set_attn_processor(DMAAttnProcessor(window=384))`.

    Each attention module keeps its stock processor, with only the attention operation diverted. Takes a
    `DMAConfig`, fields of one, or both. In a dict of processors, it is for the modules it is given to, which
    must agree on the configuration. Setting stock processors afterwards removes it.
    """

    def __init__(self, config: DMAConfig | None = None, **fields):
        self.config = DMAConfig.of(config, **fields)

    def __call__(self, *args, **kwargs):
        raise RuntimeError(
            "DMAAttnProcessor was set on a lone module, which does not tell where its text is: "
            "use model.set_attn_processor(...) or dma_diffusers.apply(model, ...)"
        )


def _with_dma(stock_method):
    @wraps(stock_method)
    def set_attn_processor(self, processor):
        from dma_diffusers import attach  # imports this module

        attach.set_attn_processor(self, processor, stock_method)

    return set_attn_processor


AttentionMixin.set_attn_processor = _with_dma(AttentionMixin.set_attn_processor)
