"""A family of transformers: what is known of it, and what follows from that for one attention call."""

from dataclasses import dataclass, replace

import torch
from torch.fx.experimental.symbolic_shapes import guard_or_false

from dma_diffusers import grids
from dma_diffusers.families import texts
from dma_diffusers.families.published import DenseFirst, Published


@dataclass(frozen=True)
class Family:
    """A family of transformers, which treat their tokens alike.

    text: the place of the text in joint attention, "first" or "last"; "none" if only cross-attention attends to text.
    refusal: the reason for which the family cannot be had, in words; empty if it can.
    text_tokens: finds the number of text tokens in joint attention from the model's forward call.
    single_stream: modules called without `encoder_hidden_states` get text and image as one sequence.
    pads_grid: modules get one sequence in which more or less stands beside the grid's tokens than the call tells; all
        tokens that are not the grid's count as text. Calls that don't tell their grid fall back to stock.
    drops_padding: modules attend to fewer tokens than they were given, without the text's padding.
    cross_attention, sound, text_only: parts of the names of modules that do cross-attention, that attend among tokens
        of sound, or among those of text alone. image_only: of modules that see the image alone.
    borrowed: the names under which the model has parts of another one, which it shares.
    masks_text: the model masks no keys of joint attention but text.
    squares_masks: modules mask padding as queries too, though nobody reads these rows; they are made to mask keys
        alone, which spares them a mask of tokens × tokens.
    timestep: the name of the model's argument. timestep_scale: its value at pure noise; None if that is not known.
    timestep_rises: the timestep is 0 at pure noise, and `timestep_scale` without noise.
    grid: finds the grid that the tokens other than text lie on; None if that is not known.
    grid_on_device: finding the grid waits for the device.
    falls_back: further calls that fall back to stock, in words; empty if none are known.
    published: a neighbourhood that was published for the family; None if none is known.
    dense_first: the steps and layers that published work keeps dense; None if none are known, or needed.
    quality_first: more of these, for users who would rather wait; known if `dense_first` is.
    """

    text: str = "none"
    refusal: str = ""
    text_tokens: texts.Finder = texts.of_prompt
    single_stream: bool = False
    pads_grid: bool = False
    drops_padding: bool = False
    cross_attention: tuple[str, ...] = ()
    sound: tuple[str, ...] = ()
    text_only: tuple[str, ...] = ()
    image_only: tuple[str, ...] = ()
    borrowed: tuple[str, ...] = ()
    masks_text: bool = False
    squares_masks: bool = False
    timestep: str = "timestep"
    timestep_scale: float | None = None
    timestep_rises: bool = False
    grid: grids.Finder | None = None
    grid_on_device: bool = False
    falls_back: str = ""
    published: Published | None = None
    dense_first: DenseFirst | None = None
    quality_first: DenseFirst | None = None

    def stock_role(self, module: str) -> str:
        """The role for which the module of this name keeps stock attention; empty if it need not."""
        if module.split(".")[0] in self.borrowed:
            return "a part of another model, which shares it"
        roles = {
            "cross-attention": self.cross_attention,
            "attention among tokens of sound": self.sound,
            "attention among tokens of text": self.text_only,
        }
        return next((role for role, parts in roles.items() if any(part in module for part in parts)), "")

    def of_module(self, module: str) -> "Family":
        """The family as the attention module of this name knows it: one that sees the image alone has no text."""
        sees_text = not any(part in module for part in self.image_only)
        return self if sees_text else replace(self, text="none", masks_text=False)

    def text_range(
        self, queries: int, keys: int, hidden: int, encoder: int, model: int | None, grid: int | None = None
    ) -> tuple[int, int] | None:
        """The text tokens (start, stop) among the keys of a self- or joint-attention call, (0, 0) if it has none.

        The arguments are numbers of tokens. queries, keys: in the call. hidden, encoder: in the `hidden_states` and
        `encoder_hidden_states` that the module was given, encoder 0 for none. model: that stand as text beside the
        image, as `text_tokens` finds it from the model's call. grid: on the model's grid, if that is known.
        Queries may be those of the image alone; the keys are then the text's and the image's.
        A compiled graph may hold lengths that are known on the device alone (those of Mochi): it takes them to be as
        the family has them.
        The result is None if the text cannot be told: in cross-attention, and in models that were given no text or
        tell no grid.
        """
        is_given_text, fewer_queries = not guard_or_false(encoder == 0), guard_or_false(queries != keys)
        if self.text == "none":
            return None if is_given_text or fewer_queries else (0, 0)
        length: int | None
        if fewer_queries:
            length = keys - queries if keys - queries == model else None
        elif self.pads_grid:
            length = None if grid is None else keys - grid
        elif is_given_text:
            length = keys - hidden
            if guard_or_false(length > encoder) or (
                not self.drops_padding and guard_or_false(length < encoder)
            ):
                return None
        else:
            length = model if self.single_stream else 0
        if length is None or guard_or_false(length < 0) or guard_or_false(length > keys):
            return None
        start = 0 if self.text == "first" or guard_or_false(length == 0) else keys - length
        return start, start + length

    def masked(self, text: tuple[int, int]) -> str:
        """The keys that a mask may hide from calls with this text: "text" for those of text alone, "keys" for any."""
        return "text" if self.masks_text and text[0] < text[1] else "keys"

    def noise_level(self, timestep: torch.Tensor) -> torch.Tensor | None:
        """The highest sigma (0 to 1) of these timesteps, on their device; None if their scale is not known."""
        if self.timestep_scale is None:
            return None
        level = timestep.float() / self.timestep_scale  # bf16 would round what it is compared with
        return (1 - level if self.timestep_rises else level).max()
