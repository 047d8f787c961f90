"""The configuration that a user chooses: precisions, policy, and the calls that they are for."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from os import PathLike, fspath
from typing import Any, NamedTuple

import torch

from dma_diffusers import schedule as schedules
from dma_diffusers.families import FAMILIES, known_family
from dma_diffusers.gains import gains_from, why_not_faster
from dma_diffusers.kernels import lowerings
from dma_diffusers.kernels.backward.int8 import check_products
from dma_diffusers.kernels.defaults import DEFAULT_POLICIES, default_formats
from dma_diffusers.kernels.formats import Rotations
from dma_diffusers.kernels.precision import Precisions
from dma_diffusers.kernels.tiling.layout import DIMENSIONS
from dma_diffusers.kernels.tiling.policies import Dense, Diagonal, Policy, parse
from dma_diffusers.kernels.tiling.precision_map import Class
from dma_diffusers.linears.methods import is_file

_B200, _HOPPER = (
    dict(zip(("high", "low"), default_formats(architecture), strict=True))
    for architecture in ("sm_100", "sm_90")
)
PRESETS: dict[str, dict[str, Any]] = {
    "auto": {"lowering": "fastest", "min_length": 2048},  # shorter calls gain nothing in plugins of this kind
    "b200": _B200,
    "hopper": _HOPPER,
    "exact": {"lowering": "stock"},
}
TEXT_PLACES = ("first", "last", "none")
CHOICES = ("auto", "fastest", "stock")  # what `lowering` takes beside the names of lowerings
# One attention module may have its own.
MODULE_FIELDS = ("high", "low", "window", "sink", "policy", "dense", "schedule", "rotation")


@dataclass(frozen=True, kw_only=True)
class DMAConfig:
    """The way attention runs, and linear layers if asked.

    Attributes:
        high: the precision of HIGH tiles: a format of Q·K, such as "int8", or the formats of Q·K and P·V, such as
            "int8/bf16". Without the second, P·V is in bf16 in HIGH tiles and in fp8 in LOW ones. Kept as the shortest
            words: "int8/fp8" for `low` becomes "int8".
        low: the precision of LOW tiles, in the same words.
        window: width of the HIGH band in tokens: 128 is the diagonal tile alone, each further 256 adds a tile on
            either side, 0 is no band. Other widths round up. A tuple has a width for each head.
        sink: tokens at the start of the keys that are always HIGH, rounded up to tiles of 128.
        policy: says which tiles are HIGH, LOW, or skipped: one of `kernels.tiling.policies`, or its words, such as
            "neighborhood(window=18x24x24, stride=16x8x8)" or "diagonal(window=384) | importance(budget=0.05)". Kept
            as words. None is the diagonal with `window` and `sink`, which are not given beside a policy.
        schedule: what holds at each noise level, in words, "sigma>0.9: dense(); sigma>0.5: importance(budget=0.15);
            importance(budget=0.05)", or as pairs of a level, falling to 0, and what holds above it: `((0.9,
            "dense()"), (0, {"policy": "importance(budget=0.05)", "low": "int8/bf16"}))`. An entry has a policy, window,
            sink, high, low, rotation, smooth_k, smooth_v, protect_text, or several of these; what it has not is as in
            the other fields. It has four at most, as torch.compile makes a graph for each with more of its own than a
            policy. The highest level of a batch counts. Reading it waits for the device once per forward call, before
            a model's compiled graph, but breaks the graph of whatever else is compiled around it. Kept as words.
        min_length: calls with fewer keys (tokens) fall back to stock attention.
        dense_above_sigma: steps with a higher noise level (0 to 1) run with every tile HIGH, 1 for no such step: as an
            entry of a schedule, beside which it is not given. None: as published for the model's family where the
            policy leaves pairs out (`families.DenseFirst`; the receipt says who by), else none; for the whole model,
            also where a single module's policy does. It is the level that counts, so of few steps many may be dense.
        dense_layers: attention modules that run with every tile HIGH, as indices into those that can be intercepted,
            in module order; negative ones count from the end. None: as for `dense_above_sigma`, () for none.
        quality_first: takes more steps and layers for those of the two that are None: a lower level and more layers
            than are needed, by what is published where there is some, else by our judgement (families.md says which).
            Changes nothing where the policy leaves no pairs out.
        lowering: the way the formats run, by the name of a lowering. "auto" takes the first that the device can run,
            down to the torch reference; "fastest" takes `native` on Blackwell GPUs (sm_100, 103, 120) and, for formats
            and lengths that were measured to gain, on Hopper, and lets other calls fall back to stock; "stock"
            quantises nothing. A lowering that is named and cannot run raises ValueError when the model is called.
        rotation: of the channels of q and k, before any format but bf16 stores them, by the same Hadamard matrix for
            both: "hadamard16" or "hadamard32" in blocks of so many, "head_dim" in one block, or "none". It spreads
            outliers in a few channels over a block. A call whose head_dim it doesn't divide raises ValueError. After a
            slash that of v: "none/hadamard32" rotates it where a class stores it in 8 bits, and turns the output back.
        smooth_k: whether k loses its mean over the tokens before any format but bf16 stores it, which changes no
            probability.
        smooth_v: whether v does before it is stored in 8 bits; the output gets that mean back.
        backward: the format of the products of attention's gradients: "bf16", or "int8", in which classes whose Q·K is
            in int8 then have six of seven (SageBwd, arXiv 2603.02170); for calls that want gradients alone.
        protect_text: whether tiles with text are HIGH whatever the window; False is for measuring what that is worth.
        text: where joint attention has its text, "first", "last" or "none", for models of no known family.
        grid: the sides of the grid that tokens other than text lie on, (rows, columns) or (frames, rows, columns), or
            in words, "64x64"; for policies that need it, and models of no known family.
        modules: fields that single attention modules have of their own, `{"transformer_blocks.0.attn": {"window":
            384}}`: high, low, window, sink, policy, schedule, rotation, or dense=True for every tile HIGH. A policy,
            window, sink or schedule stands in the place of all four of the others'; high, low and rotation give way to
            those of a schedule. Kept as sorted pairs. Blocks that torch.compile compiles one by one are compiled anew
            for other formats, but not for other policies, nor for every tile HIGH.
        guard: a relative error, such as 0.2. A few rows of a few calls are compared with exact attention; a module
            whose error passes this, or whose output becomes non-finite, turns to HIGH everywhere, and if that does not
            help to stock attention, until it is applied again. The step in which that shows is made again; the receipt
            says so. math.inf is for the estimate in the receipt alone. None samples nothing. Calls that want gradients
            are not looked at.
        linears: low-bit linear layers beside attention: a method of `quantize_linears` ("fp8", "int8", "mxfp8",
            "mxfp4", "nvfp4", or "micromix" for pipelines on which `calibrate_linears` ran), the recipe by which
            `finetune.prepare` trained them ("qat", "quartet", "quartet2", "mxint8"), or a file of `save_linears`. None
            leaves linear layers as they are.
        model: the class of the only models that this is for; `modules` then names each of their modules.
        weights: fingerprints of the weights that this was chosen for, joined by "+", one for each transformer. On
            other weights it is applied all the same, and the receipt says so. None and "" are for any.

    Raises:
        ValueError: for a value that is not allowed, and for values that contradict each other.

    Examples:
        >>> DMAConfig(high="bf16", low="int8", policy="importance(budget=0.05)", dense_above_sigma=0.9)
    """

    high: str = _B200["high"]
    low: str = _B200["low"]
    window: int | tuple[int, ...] = 128
    sink: int = 128
    policy: Policy | str | None = None
    schedule: str | tuple[tuple[float, Any], ...] | None = None
    min_length: int = 256
    dense_above_sigma: float | None = None
    dense_layers: tuple[int, ...] | None = None
    quality_first: bool = False
    lowering: str = "auto"
    rotation: str = "none"
    smooth_k: bool = True
    smooth_v: bool = True
    backward: str = "bf16"
    protect_text: bool = True
    text: str | None = None
    grid: tuple[int, ...] | str | None = None
    modules: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...] | Mapping[str, Mapping[str, Any]] = ()
    guard: float | None = None
    linears: str | None = None
    model: str | None = None
    weights: str | None = None

    def __post_init__(self):
        for name, words in zip(("high", "low"), Precisions.parse(self.high, self.low).words, strict=True):
            object.__setattr__(self, name, words)
        Rotations.parse(self.rotation)
        check_products(self.backward, self.high, self.low, self.rotation)
        if isinstance(self.window, list):
            object.__setattr__(self, "window", tuple(self.window))
        of_heads = self.window if isinstance(self.window, tuple) and self.window else (self.window,)
        widths: list[tuple[str, Any]] = [("window", width) for width in of_heads]
        for name, value in [*widths, ("sink", self.sink), ("min_length", self.min_length)]:
            if not _is_integer(value) or value < 0:
                raise ValueError(f"{name} must be a whole number of tokens, 0 or more, got {value!r}")
        if self.policy is not None:
            self._check_policy()
        if self.schedule is not None:
            self._check_schedule()
        sigma = self.dense_above_sigma
        if sigma is not None and not (isinstance(sigma, int | float) and 0 <= sigma <= 1):
            raise ValueError(f"dense_above_sigma must be a number between 0 and 1, or None, got {sigma!r}")
        if self.dense_layers is not None:
            if not isinstance(self.dense_layers, tuple | list) or not all(
                map(_is_integer, self.dense_layers)
            ):
                raise ValueError(
                    f"dense_layers must be a tuple of whole numbers, or None, got {self.dense_layers!r}"
                )
            object.__setattr__(self, "dense_layers", tuple(self.dense_layers))
        for name in ("quality_first", "smooth_k", "smooth_v", "protect_text"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        allowed = [*CHOICES, *(lowering.name for lowering in lowerings.LOWERINGS)]
        if self.lowering not in allowed:
            raise ValueError(f"unknown lowering {self.lowering!r}; there are {', '.join(allowed)}")
        if self.text is not None and self.text not in TEXT_PLACES:
            raise ValueError(f"text must be one of {', '.join(TEXT_PLACES)}, or None, got {self.text!r}")
        if self.grid is not None:
            object.__setattr__(self, "grid", _sides(self.grid))
        guard = self.guard
        if guard is not None and (
            isinstance(guard, bool) or not isinstance(guard, int | float) or not guard > 0
        ):
            raise ValueError(
                "guard must be a relative error more than 0, such as 0.2, inf for the estimate alone, or None, "
                f"got {guard!r}"
            )
        if self.linears is not None:
            self._check_linears()
        if self.model is not None and not isinstance(self.model, str):
            raise ValueError(f"model must be the name of a class, or None, got {self.model!r}")
        if self.weights is not None and not isinstance(self.weights, str):
            raise ValueError(f"weights must be fingerprints, or None, got {self.weights!r}")
        object.__setattr__(self, "modules", _frozen(self.modules))
        object.__setattr__(self, "modules", tuple((name, self._checked(name)) for name in dict(self.modules)))

    @classmethod
    def from_file(
        cls, path: str | PathLike[str], quality: float | None = None, **changes: Any
    ) -> "DMAConfig":
        """The configuration that `dma-diffusers calibrate` chose, from its policy file.

        Args:
            path: the policy file. Its `linears`, if it has any, is a file in the same folder.
            quality: from 0, the cheapest, to 1, closest to full precision: the file's choice at or above it; None for
                the one that the file was made for.
            **changes: fields that are to be other than the file's.

        Returns:
            The configuration, which fits the model that it was chosen for alone.

        Raises:
            OSError: where the file cannot be read.
            ValueError: where it is no such file, or for another quality.
        """
        from dma_diffusers.policy_file import read_choice

        choice = read_choice(path, quality)
        try:
            config = cls.of(None, **choice)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from None
        return cls.of(config, **changes)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "DMAConfig":
        """The configuration called `name`, with some fields changed.

        Args:
            name: "b200": MXFP8 and MXFP4, native on Blackwell. "hopper": bf16 and int8, native on Hopper too. "auto":
                the formats that this process's GPU multiplies fastest (`kernels.defaults`), where they are faster than
                stock attention, which runs elsewhere; on Hopper every tile is LOW, unless a window, a sink or a policy
                is given. "exact": stock attention everywhere; it takes no changes but `linears`.
            **changes: fields that are to be other than the preset's.

        Raises:
            ValueError: for another name, or a field that the preset does not take.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; there are {', '.join(PRESETS)}")
        if name == "exact" and (refused := [change for change in changes if change != "linears"]):
            raise ValueError(f"preset 'exact' quantises nothing, so it takes no {', '.join(refused)}")
        formats: dict[str, Any] = {}
        if name == "auto":
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            architecture = lowerings.architecture(device)
            formats = dict(zip(("high", "low"), default_formats(architecture), strict=True))
            if not (changes.keys() & {"policy", *DIAGONAL} or _names_every_policy(changes.get("schedule"))):
                formats["policy"] = DEFAULT_POLICIES.get(architecture)
        return cls.of(None, **PRESETS[name] | formats | changes)

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> "DMAConfig":
        """The configuration that a file's fields say: fields of this class, with lists for tuples, perhaps a `preset`.

        A `policy` without parentheses is a policy file of `calibrate`, which goes with a `quality`, not with a preset.
        Raises ValueError for anything else, OSError where a policy file cannot be read.
        """
        fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
        if "policy" in fields and not is_words(str(fields["policy"])):
            return cls.from_file(fields.pop("policy"), **fields)
        if "quality" in fields:
            raise ValueError("quality chooses from a policy file: give that as policy")
        if "preset" in fields:
            return cls.preset(str(fields.pop("preset")), **fields)
        return cls.of(None, **fields)

    @classmethod
    def published(
        cls, model: torch.nn.Module, grid: tuple[int, ...], beyond: str = "skip", **changes: Any
    ) -> "DMAConfig":
        """The neighbourhood that was published for the family of `model`, with some fields changed.

        It was published in full precision; here what the window holds is LOW, but for text. Steps above the family's
        noise level are dense. FLUX's level is that of its schedule at 1024×1024. Diffusers' own schedule shifts with
        the size: at 2048×2048 22 of 28 steps lie above it, at 4096×4096 all of them: give the scheduler another shift
        there, or dense_above_sigma=1.

        Args:
            model: a transformer.
            grid: of the pictures or videos to be made, (rows, columns) or (frames, rows, columns) in tokens: its
                window is the same share of it as of the published one (`families.Published`).
            beyond: "skip" leaves out the tiles beyond the window, as published; "mean" takes them by their means,
                which costs a little more and keeps what they weigh.
            **changes: further fields of the configuration.

        Raises:
            ValueError: for a family without one, or another `beyond`.
        """
        family = known_family(model)
        if family is None or family.published is None:
            known = ", ".join(name for name, family in FAMILIES.items() if family.published)
            raise ValueError(f"no neighbourhood was published for {type(model).__name__}; there are {known}")
        classes = {"mean": Class.MEAN, "skip": Class.SKIP}
        if beyond not in classes:
            raise ValueError(f"beyond must be mean or skip, got {beyond!r}")
        return cls.of(None, **{"policy": family.published.policy(grid, classes[beyond])} | changes)

    @classmethod
    def of(cls, config: "DMAConfig | None", **changes) -> "DMAConfig":
        """`config` (None: the default) with some fields changed."""
        if config is not None and not isinstance(config, DMAConfig):
            raise TypeError(f"config must be a DMAConfig, got {type(config).__name__}")
        known = [field.name for field in fields(cls)]
        if unknown := [name for name in changes if name not in known]:
            raise ValueError(f"unknown option {', '.join(unknown)}; there are {', '.join(known)}")
        current = {name: getattr(config, name) for name in known} if config else {}
        return cls(**current | changes)

    def of_module(self, name: str) -> "DMAConfig":
        """The configuration of one attention module."""
        changes = {field: value for field, value in self._own(name).items() if field != "dense"}
        replaced: dict[str, Any] = {"modules": (), "model": None, "weights": None}
        if "policy" in changes or _names_every_policy(changes.get("schedule")):
            replaced |= {"policy": None, "schedule": None, **DIAGONAL}
        elif changes.keys() & DIAGONAL:
            replaced |= {"policy": None, "schedule": None}
        return replace(self, **replaced | changes)

    def is_dense(self, name: str) -> bool:
        """Tells whether `modules` asks for every tile of this attention module to be HIGH."""
        return self._own(name).get("dense", False)

    @cached_property
    def entries(self) -> tuple["Entry", ...]:
        """The configurations of the schedule, which have none themselves; without a schedule it is this one alone."""
        if self.schedule is None:
            return (Entry(0.0, self),)
        alone: dict[str, Any] = {"schedule": None, "modules": (), "model": None, "weights": None}
        return tuple(
            Entry(part.above, replace(self, **alone | (DIAGONAL if part.policy else {}) | part.fields))
            for part in schedules.read(self.schedule)
        )

    @cached_property
    def asked(self) -> Policy:
        """The policy that is given, or the diagonal with `window` and `sink`; a schedule's entries have their own."""
        return Diagonal(self.window, self.sink) if self.policy is None else parse(self.policy)

    @cached_property
    def words(self) -> str:
        """The policy in words."""
        return str(self.asked)

    def arguments(self, text: tuple[int, int], grid: tuple[int, ...] = ()) -> dict[str, Any]:
        """Keyword arguments of `kernels.operator.attention`, for a call with text tokens from start to stop.

        grid: the sides of the grid that the other tokens lie on; () will do where the policy doesn't ask.
        """
        start, stop = self.protected(text)
        return {
            "high": self.high, "low": self.low, "policy": self.words, "grid": grid if self.asked.on_grid else (),
            "text_start": start, "text_stop": stop, "lowering": self.operator_lowering, "rotation": self.rotation,
            "smooth_k": self.smooth_k, "smooth_v": self.smooth_v, "backward": self.backward,
        }  # fmt: skip

    def protected(self, text: tuple[int, int]) -> tuple[int, int]:
        """Start and stop of the text tokens that are HIGH; (0, 0) if text is not protected."""
        return text if self.protect_text else (0, 0)

    def why_stock(self, device: torch.device, head_dim: int, masked: str = "") -> str:
        """The reason for which calls with `head_dim` on `device` fall back to stock; empty if they need not.

        masked: "text" if keys of the text alone are masked, "keys" if any may be, empty for none.
        """
        if self.lowering == "stock":
            return "exact: nothing is quantised"
        if self.lowering != "fastest":
            return ""
        return why_not_faster(device, head_dim, self.high, self.low, masked)

    def least_keys(self, device: torch.device, head_dim: int) -> int:
        """The fewest keys of a call that does not fall back to stock attention for its length."""
        if self.lowering != "fastest":
            return self.min_length
        return max(self.min_length, gains_from(device, head_dim, self.asked == Dense(Class.LOW)))

    @property
    def operator_lowering(self) -> str:
        """The lowering to ask the operator for."""
        return "auto" if self.lowering == "fastest" else self.lowering

    def check_device(self, device: torch.device) -> None:
        """Raises ValueError, in one line, for a lowering that can't run these formats on `device` at any head_dim."""
        if self.lowering not in ("fastest", "stock"):
            for _, config in self.entries:
                lowerings.choose(lowerings.architecture(device), 1, config.high, config.low, self.lowering)

    def _own(self, name: str) -> dict[str, Any]:
        """The fields that one of `modules` has of its own."""
        return dict(dict(self.modules).get(name, ()))

    def _checked(self, name: str) -> tuple[tuple[str, Any], ...]:
        """The fields of one of `modules`, its precisions in the shortest words; ValueError if they are not allowed."""
        changes = self._own(name)
        if unknown := [field for field in changes if field not in MODULE_FIELDS]:
            known = ", ".join(MODULE_FIELDS)
            raise ValueError(f"modules: {name} has no {', '.join(map(str, unknown))}; there are {known}")
        if not isinstance(self.is_dense(name), bool):
            raise ValueError(f"modules: {name}: dense must be true or false, got {self.is_dense(name)!r}")
        if self.is_dense(name) and "schedule" in changes:
            raise ValueError(f"modules: {name}: dense and a schedule: give one of them")
        try:
            own = self.of_module(name)
        except (ValueError, TypeError) as error:
            raise ValueError(f"modules: {name}: {error}") from None
        return tuple(
            (key, getattr(own, key) if key in ("high", "low", "schedule") else value)
            for key, value in changes.items()
        )

    def _check_linears(self) -> None:
        if not isinstance(self.linears, str | PathLike):
            raise ValueError(f"linears must be a method, a file, or None, got {self.linears!r}")
        object.__setattr__(self, "linears", fspath(self.linears))
        is_file(fspath(self.linears))

    def _check_policy(self) -> None:
        if not isinstance(self.policy, str | Policy):
            raise ValueError(f"policy must be a policy, its words, or None, got {self.policy!r}")
        policy = parse(self.policy) if isinstance(self.policy, str) else self.policy
        object.__setattr__(self, "policy", str(policy))
        if {"window": self.window, "sink": self.sink} != DIAGONAL:
            raise ValueError(f"window and sink are those of a diagonal: leave them out, or {policy}")
        if policy.on_grid and not self.protect_text:
            raise ValueError(f"protect_text=False is for policies without a grid, not for {policy}")

    def _check_schedule(self) -> None:
        parts = schedules.read(self.schedule)
        object.__setattr__(self, "schedule", schedules.write(parts))
        if self.dense_above_sigma not in (None, 1):
            raise ValueError(
                f"dense_above_sigma={self.dense_above_sigma} and a schedule: make it an entry of that, "
                f"sigma>{self.dense_above_sigma}: dense()"
            )
        if _names_every_policy(self.schedule) and (
            self.policy is not None or {"window": self.window, "sink": self.sink} != DIAGONAL
        ):
            raise ValueError(f"every entry of the schedule has a policy: leave them out, or {self.words}")
        _ = self.entries  # raises for what a configuration of its own could not have either


class Entry(NamedTuple):
    """One entry of a schedule.

    above: the noise level (0 to 1) above which it holds, up to that of the entry before; the last holds for the rest.
    """

    above: float
    config: DMAConfig


def is_words(policy: str) -> bool:
    """Tells whether this text says a policy, and does not name a policy file."""
    return policy.rstrip().endswith(")")


# The values of window and sink where they are not given.
DIAGONAL: dict[str, Any] = {
    field.name: field.default for field in fields(DMAConfig) if field.name in ("window", "sink")
}


def _names_every_policy(schedule: Any) -> bool:
    """Tells whether there is a schedule, and each of its entries has a policy of its own."""
    return schedule is not None and all(part.policy for part in schedules.read(schedule))


def _is_integer(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _sides(grid: Any) -> tuple[int, ...]:
    """The sides of a grid that is given as numbers or in words."""
    if isinstance(grid, str) and re.fullmatch(r"\d+([x×]\d+)*", grid):
        grid = [int(side) for side in re.split("[x×]", grid)]
    if not isinstance(grid, tuple | list) or not 1 <= len(grid) <= DIMENSIONS:
        grid = None
    if grid is None or not all(_is_integer(side) and side > 0 for side in grid):
        raise ValueError(
            f"grid must be 1 to {DIMENSIONS} whole numbers of tokens, such as (64, 64), got {grid!r}"
        )
    return tuple(grid)


def _frozen(modules: Any) -> tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]:
    """Turns mappings of mappings, or pairs of pairs, into sorted pairs of sorted pairs."""
    try:
        named = {name: dict(changes) for name, changes in dict(modules).items()}
        return tuple(
            (name, tuple((key, _constant(value)) for key, value in sorted(changes.items())))
            for name, changes in sorted(named.items())
        )
    except (TypeError, ValueError):
        raise ValueError(
            f"modules must map names of attention modules to fields of their own, got {modules!r:.100}"
        ) from None


def _constant(value: Any) -> Any:
    """Turns a list into a tuple, and a policy into its words."""
    if isinstance(value, Policy):
        return str(value)
    return tuple(value) if isinstance(value, list) else value
