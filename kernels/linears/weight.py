"""A quantised weight: in memory as the matrix products read it, in files as small as its bits allow."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from dma_diffusers.kernels.formats import (
    E4M3,
    Format,
    Packed,
    Scale,
    join_six_bits,
    pack,
    split_six_bits,
    unpack,
)
from dma_diffusers.kernels.linears.groups import Groups
from dma_diffusers.kernels.linears.layout import plain_scales, tiled_scales


@dataclass(frozen=True)
class LinearWeight:
    """The weight of a linear layer, its input channels permuted and in groups. What it doesn't need is None.

    groups: the formats of the channels, after the permutation.
    out_features: the number of rows, N.
    narrow: uint8 `[N, n/2]`, the 4-bit channels, two e2m1 codes to a byte, the even one in the low nibble.
    narrow_scales: their block scales, `[1, N/128, blocks/4, 2, 256]` (`tiled_scales`), uint8 E8M0, or E4M3 for nvfp4.
    wide: `[N, w]`, the other channels: e4m3, which holds 6-bit numbers exactly, or int8; with `bf16` the weight itself.
    wide_scales: their block scales, uint8 E8M0, laid out like the narrow ones.
    row_scales: float32 `[N]`, or `[]` where one scale belongs to the whole weight: of fp8, int8 and nvfp4.
    permutation: int32 `[K]`: channel i of the groups is channel `permutation[i]` of the layer.
    """

    groups: Groups
    out_features: int
    narrow: Tensor | None = None
    narrow_scales: Tensor | None = None
    wide: Tensor | None = None
    wide_scales: Tensor | None = None
    row_scales: Tensor | None = None
    permutation: Tensor | None = None

    @property
    def bytes(self) -> int:
        """The memory that its tensors take."""
        return sum(x.numel() * x.element_size() for x in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name, those that it has."""
        return {name: getattr(self, name) for name in _TENSORS if getattr(self, name) is not None}

    @classmethod
    def from_tensors(cls, groups: Groups, tensors: dict[str, Tensor]) -> "LinearWeight":
        """The weight that has these tensors; raises TypeError for a name that no weight has."""
        elements = tensors["narrow"] if "narrow" in tensors else tensors["wide"]
        return cls(groups, elements.shape[0], **tensors)

    def permuted(self, dtype: torch.dtype) -> Tensor:
        """The numbers that it stores, `[N, K]`, in the order of the groups."""
        if self.groups.formats == ("bf16",):
            return self.wide.to(dtype)
        if self.groups.block is None:
            scale = self.row_scales if self.row_scales.ndim == 0 else self.row_scales[:, None]
            return (self.wide.float() * scale).to(dtype)
        parts = []
        for format, codes, scales in self._codes():
            tensor_scale = self.row_scales[:, None] if format.has_tensor_scale else None
            shape = torch.Size((self.out_features, scales.shape[1] * format.block))
            parts.append(unpack(Packed(codes, scales, tensor_scale, format, shape), dtype))
        return torch.cat(parts, dim=1)

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """The numbers that it stores, `[N, K]`, in the layer's own order of channels."""
        weight = self.permuted(dtype)
        if self.permutation is None:
            return weight
        return torch.empty_like(weight).index_copy_(1, self.permutation.long(), weight)

    def packed(self) -> dict[str, Tensor]:
        """Its tensors for a file, which `from_packed` reads: of each group codes and scales, and what is common.

        6-bit codes lie four to three bytes, scales `[N, blocks]` row by row.
        """
        common = {name: getattr(self, name) for name in ("row_scales", "permutation")}
        found = {name: x for name, x in common.items() if x is not None}
        if self.groups.block is None:
            return found | {"codes.0": self.wide}
        for index, (format, codes, scales) in enumerate(self._codes()):
            found[f"codes.{index}"] = join_six_bits(codes) if format.bits == 6 else codes
            found[f"scales.{index}"] = scales.contiguous()
        return found

    @classmethod
    def from_packed(cls, groups: Groups, packed: dict[str, Tensor]) -> "LinearWeight":
        """The weight that `packed` gave these tensors; raises KeyError where one of them is missing."""
        common = {name: packed[name] for name in ("row_scales", "permutation") if name in packed}
        if groups.block is None:
            return cls(groups, packed["codes.0"].shape[0], wide=packed["codes.0"], **common)
        codes = [
            split_six_bits(packed[f"codes.{index}"]) if format.bits == 6 else packed[f"codes.{index}"]
            for index, (format, _) in enumerate(groups.slices)
        ]
        return _joined(groups, codes, [packed[f"scales.{index}"] for index in range(len(codes))], **common)

    def _codes(self) -> list[tuple[Format, Tensor, Tensor]]:
        """Gives for each group of a block format: format, codes as `pack` gives them, scales `[N, blocks]`."""
        found = []
        for format, channels in self.groups.slices:
            first, last = channels.start, channels.stop
            if format.bits == 4:
                codes, scales, of_all = self.narrow, self.narrow_scales, self.groups.narrow
                codes = codes[:, first // 2 : last // 2]
            else:
                codes, scales, of_all = self.wide, self.wide_scales, self.groups.wide
                first, last = first - self.groups.narrow, last - self.groups.narrow
                codes = codes.view(torch.uint8)[:, first:last]
                if format.bits == 6:
                    codes = format.element.encode(E4M3.decode(codes))
            scales = plain_scales(scales.view(torch.uint8), self.out_features, of_all // format.block)
            found.append((format, codes, scales[:, first // format.block : last // format.block]))
        return found


_TENSORS = tuple(field.name for field in fields(LinearWeight))[2:]


def quantise(
    weight: Tensor, groups: Groups, permutation: Tensor | None = None, *, one_scale: bool = False
) -> LinearWeight:
    """The weight `[N, K]`, of any float dtype, in the formats of its groups, on its own device.

    permutation: int32 `[K]`, the channels in the order of the groups.
    one_scale: gives fp8 one scale for the whole weight in place of one for each row.
    Block scales never clip; nvfp4 has four-over-six scales under a float32 scale for each row.
    Raises ValueError where the groups are not as wide as the weight, or a permutation isn't one of its channels.
    """
    if weight.ndim != 2 or weight.shape[1] != groups.in_features:
        raise ValueError(f"groups of {groups.in_features} channels don't fit a weight {list(weight.shape)}")
    if permutation is not None:
        permutation = _checked(permutation, groups).to(weight.device)
        weight = weight[:, permutation.long()]
    if groups.formats == ("bf16",):
        return LinearWeight(groups, len(weight), wide=weight.contiguous(), permutation=permutation)
    if one_scale and groups.formats != ("fp8",):
        raise ValueError(f"one scale for a whole weight is for fp8, not for {' | '.join(groups.formats)}")
    if one_scale:
        scale = weight.abs().amax().float().clamp(min=torch.finfo(torch.float32).smallest_normal) / E4M3.max
        wide = E4M3.encode(weight.float() / scale).view(torch.float8_e4m3fn)
        return LinearWeight(groups, len(weight), wide=wide, row_scales=scale, permutation=permutation)
    packed = [_packed(weight[:, channels], format) for format, channels in groups.slices]
    if groups.block is None:
        dtype = torch.int8 if groups.formats == ("int8",) else torch.float8_e4m3fn
        return LinearWeight(
            groups,
            len(weight),
            wide=packed[0].data.view(dtype),
            row_scales=packed[0].scales.flatten(),
            permutation=permutation,
        )
    row_scales = packed[0].tensor_scale
    return _joined(
        groups,
        [each.data for each in packed],
        [each.scales for each in packed],
        row_scales=None if row_scales is None else row_scales.flatten(),
        permutation=permutation,
    )


def _packed(weight: Tensor, format: Format) -> Packed:
    if format.scale is not Scale.E4M3:
        return pack(weight, format)
    amax = weight.float().abs().nan_to_num(nan=0.0, posinf=0.0).amax(1, keepdim=True)
    return pack(weight, format, tensor_amax=amax, four_over_six=True)


def _joined(
    groups: Groups, codes: list[Tensor], scales: list[Tensor], **common: Tensor | None
) -> LinearWeight:
    """The weight of block formats whose groups have these codes, as `pack` gives them, and scales `[N, blocks]`."""
    parts: dict[str, list[Tensor]] = {"narrow": [], "wide": [], "narrow_scales": [], "wide_scales": []}
    for (format, _), code, scale in zip(groups.slices, codes, scales, strict=True):
        name = "narrow" if format.bits == 4 else "wide"
        if format.bits == 6:
            code = E4M3.encode(format.element.decode(code))
        parts[name].append(code)
        parts[f"{name}_scales"].append(scale)
    joined: dict[str, Tensor] = {name: torch.cat(xs, dim=1) for name, xs in parts.items() if xs}
    for name in ("narrow_scales", "wide_scales"):
        if name in joined:
            tiled = tiled_scales(joined[name])
            joined[name] = tiled.view(torch.float8_e4m3fn) if groups.has_row_scales else tiled
    if "wide" in joined:
        joined["wide"] = joined["wide"].view(torch.float8_e4m3fn)
    return LinearWeight(groups, len(codes[0]), **joined, **common)


def _checked(permutation: Tensor, groups: Groups) -> Tensor:
    channels = torch.arange(groups.in_features, device=permutation.device)
    if permutation.shape != channels.shape or not torch.equal(permutation.long().sort().values, channels):
        raise ValueError(
            f"a permutation must name each of {groups.in_features} channels once, got {list(permutation.shape)}"
        )
    return permutation.to(torch.int32)
