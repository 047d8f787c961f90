"""The linear layers of a transformer that are left alone or kept at more bits, and why, with the sources."""

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MULTIPLE = 32
# Parts of a block that see one vector for each picture, or some of the tokens. NVIDIA's Model Optimizer
# (examples/diffusers/quantization/utils.py), SGLang and vLLM-Omni keep all of these in full precision; vLLM-Omni's
# pictures turned to noise where it did not (vllm-project/vllm-omni #2728, #2795).
_NO_TOKENS = re.compile(
    r"(norm\w*|\w*mod|\w*modulation\w*|ada\w*|\w*embed\w*|time\w*|\w*scale_shift\w*|router|gate|\w*gate_logits|experts)"
)
_OF_LORA = re.compile(r"\.lora_\w+\.")
_REFINERS = re.compile(r"\w*(refiner|embed|extractor|projection|perceiver)\w*")


@dataclass(frozen=True)
class Sensitive:
    """A part of a family's blocks that published work found to need more bits.

    pattern: matches the ends of the names of its layers; empty for all layers of `blocks`.
    blocks: the first and last blocks that it is restricted to, as two numbers; None for every block.
    keeps: "bf16" leaves the layers alone; "mxfp8" gives them eight bits where a method would give fewer.
    source: who published it, and what of it is our own judgement.
    """

    keeps: str
    source: str
    pattern: str = ""
    blocks: tuple[int, int] | None = None

    def covers(self, name: str, block: int, count: int) -> bool:
        """Tells whether the layer called `name`, in one of `count` blocks of a list, belongs to it."""
        if self.blocks and self.blocks[0] <= block < count - self.blocks[1]:
            return False
        return re.search(self.pattern, name) is not None


_OPTIMIZER = "NVIDIA's Model Optimizer (examples/diffusers/quantization) has them in bf16; eight bits are our judgement"
_WAN = (
    Sensitive(
        "bf16",
        "with FP8 attention layers long clips of Wan 2.2 collapsed to noise (vllm-project/vllm-omni #2920)",
        r"\.(attn\d|self_attn|cross_attn)\.",
    ),
    Sensitive("mxfp8", f"the three first and last blocks of Wan 2.2: {_OPTIMIZER}", blocks=(3, 3)),
)
SENSITIVE: dict[str, tuple[Sensitive, ...]] = {
    "QwenImageTransformer2DModel": (
        Sensitive(
            "bf16",
            "FP8 there changed pictures of Qwen-Image (sgl-project/sglang #23155; vllm-project/vllm-omni #1034)",
            r"\.img_mlp\.net\.2$",
        ),
        Sensitive("mxfp8", f"the two first and last blocks of Qwen-Image: {_OPTIMIZER}", blocks=(2, 2)),
    ),
    "WanTransformer3DModel": _WAN,
    "WanVACETransformer3DModel": _WAN,
    "LTXVideoTransformer3DModel": (
        Sensitive("mxfp8", f"the three first and last blocks of LTX-Video: {_OPTIMIZER}", blocks=(3, 3)),
    ),
    "StableAudioDiTModel": (
        Sensitive(
            "bf16",
            "FP8 in the feed-forward layers of Stable Audio gave noise (vllm-project/vllm-omni #3524)",
            r"\.ff\.net\.",
        ),
    ),
}
"""The sensitive parts of families, by the model's class. Nothing is known of the others."""


@dataclass(frozen=True)
class Choice:
    """The linear layers of one model that are to be quantised, and the reasons for those that are not.

    layers: the stock layers by name, in module order. A layer inside of a LoRA wrapper has the wrapper's name.
    blocks: the name of the block that each of them stands in.
    kept: the sources, for layers that keep eight bits at least.
    left: the reasons for which others are left alone, by name.
    """

    layers: dict[str, torch.nn.Linear] = field(default_factory=dict)
    blocks: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)


def choose(
    model: torch.nn.Module,
    modules: Collection[str] | None = None,
    skip: Collection[str] = (),
    sensitive: bool = True,
) -> Choice:
    """The linear layers of a transformer's blocks that every token passes, without those that had better be left alone.

    modules, skip: names of layers to take alone, or to leave alone, with `*` for any text.
    sensitive: whether `SENSITIVE` parts keep more bits.
    Raises ValueError for a name in `modules` or `skip` that no layer has, or a name alone in the place of several.
    """
    for option, given in (("modules", modules), ("skip", skip)):
        if isinstance(given, str):
            raise ValueError(f"{option} must be a list of names, got {given!r}: give [{given!r}]")
    choice = Choice()
    named = linear_layers(model)
    for pattern in [*(modules or ()), *skip]:
        if not any(fnmatchcase(name, pattern) for name in named):
            raise ValueError(f"{type(model).__name__} has no linear layer {pattern!r}")
    parts = _sensitive_parts(model) if sensitive else ()
    for name, layer in named.items():
        reason = _why_left(model, name, layer)
        if not reason and _matches(name, skip):
            reason = "left out by skip"
        if not reason and modules is not None and not _matches(name, modules):
            reason = "not among modules"
        block, number, count = block_of(model, name)
        covering = [part for part in parts if block and part.covers(name, number, count)]
        if not reason and (kept_whole := [part for part in covering if part.keeps == "bf16"]):
            reason = f"published as sensitive: {kept_whole[0].source}"
        if reason:
            choice.left[name] = reason
            continue
        choice.layers[name] = layer
        choice.blocks[name] = block
        if covering:
            choice.kept[name] = covering[0].source
    return choice


def linear_layers(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """The linear layers of a model, by name; a layer inside of a LoRA wrapper has the wrapper's, and LoRA has none."""
    found = ((name, m) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear))
    return {name.removesuffix(".base_layer"): m for name, m in found if not _OF_LORA.search(name)}


def _sensitive_parts(model: torch.nn.Module) -> tuple[Sensitive, ...]:
    names = (base.__name__ for base in type(model).__mro__)
    return next((SENSITIVE[name] for name in names if name in SENSITIVE), ())


def _matches(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def block_of(model: torch.nn.Module, name: str) -> tuple[str, int, int]:
    """The name of the block that a layer stands in, its number, and how many there are; ("", 0, 0) outside blocks."""
    of_list, _, rest = name.partition(".")
    number, _, inside = rest.partition(".")
    blocks = getattr(model, of_list, None)
    if not inside or not isinstance(blocks, torch.nn.ModuleList) or _REFINERS.fullmatch(of_list):
        return "", 0, 0
    return f"{of_list}.{number}", int(number), len(blocks)


def why_not_plain(layer: torch.nn.Linear) -> str:
    """The reason for which a layer is none of PyTorch's own with a plain weight; empty if it is one."""
    weight = layer._parameters.get("weight")
    kind = type(weight if weight is None else weight.data).__name__
    if type(layer) is torch.nn.Linear and kind == "Tensor" and type(weight) is torch.nn.Parameter:
        return ""
    own = kind if type(weight) in (torch.nn.Parameter, type(None)) else type(weight).__name__
    return f"quantised already, or of a kind of its own: {type(layer).__name__} with a weight of {own}"


def _why_left(model: torch.nn.Module, name: str, layer: torch.nn.Linear) -> str:
    """The reason for which a layer can't be quantised, or had better not be; empty if there is none."""
    block, *_ = block_of(model, name)
    if not block:
        return "outside the blocks: embedders, refiners, and the final projection"
    if any(_NO_TOKENS.fullmatch(part) for part in name.removeprefix(f"{block}.").split(".")):
        return "modulation, norm, embedding or expert: not every token passes it"
    return why_unfit(layer)


def why_unfit(layer: torch.nn.Linear) -> str:
    """The reason for which a layer can't be quantised, wherever it stands; empty if it can."""
    if reason := why_not_plain(layer):
        return reason
    weight = layer.weight
    if weight.dtype not in DTYPES:
        return f"its weight is stored in {str(weight.dtype).removeprefix('torch.')}"
    if layer.in_features % _MULTIPLE or layer.out_features % 16:
        return (
            f"its width {layer.in_features} → {layer.out_features} is no multiple of {_MULTIPLE} → 16, "
            "which blocks of scales and the MMA need"
        )
    return ""
