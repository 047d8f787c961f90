"""The grid that a model's image or video tokens lie on, found from the arguments of its forward call.

Every finder takes the model and the call's arguments by name, and gives (rows, columns) of an image or (frames, rows,
columns) of a video, in tokens: the order in which Diffusers' models flatten them, the last one fastest. Each raises
ValueError for a call that does not say its grid, or has none.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

Grid = tuple[int, ...]
Finder = Callable[[torch.nn.Module, Mapping[str, Any]], Grid]


def given(grid: Grid, model: torch.nn.Module, call: Mapping[str, Any]) -> Grid:
    """Gives the grid that the user says."""
    return grid


def of_image(model: torch.nn.Module, call: Mapping[str, Any]) -> Grid:
    """Reads the grid from latents `[B, C, H, W]` and the patch size, which may be None, for 1."""
    (latents,) = _arguments(call, "hidden_states")
    if latents.ndim != 4:
        raise ValueError(
            f"hidden_states of {latents.ndim} dimensions, not 4, do not tell their grid: say it, with grid="
        )
    return tuple(length // (_config(model).get("patch_size") or 1) for length in latents.shape[2:])


def of_square_image(model: torch.nn.Module, call: Mapping[str, Any]) -> Grid:
    """Reads the grid as `of_image` does, for a model that puts padding behind the tokens of other images."""
    rows, columns = of_image(model, call)
    if rows != columns:
        raise ValueError(
            f"the model puts padding behind the tokens of an image of {rows}×{columns}, which is no square: "
            "use a policy that needs no grid"
        )
    return rows, columns


def of_image_alone(model: torch.nn.Module, call: Mapping[str, Any]) -> Grid:
    """Reads the grid as `of_image` does, for a model in which it begins where the text of each batch entry ends.

    Other images must not join the call, and the texts of a batch must be alike in length: their masks are read.
    """
    if call.get("context_latents"):
        raise ValueError("other images join the call, in context_latents: use a policy that needs no grid")
    mask = call.get("encoder_attention_mask")
    if mask is not None and len(mask) > 1 and len(_once(mask, lambda mask: set(mask.sum(1).tolist()))) > 1:
        raise ValueError(
            "the texts of the batch differ in length, and each image begins where its text ends: "
            "draw them one by one, or use a policy that needs no grid"
        )
    return of_image(model, call)


def of_video(model: torch.nn.Module, call: Mapping[str, Any]) -> Grid:
    """Reads the grid from latents `[B, C, T, H, W]`, or `[B, C, H, W]`, and the patch sizes.

    The model's configuration has these in one entry or in two. Without an entry for time, that of time is 1.
    """
    (latents,) = _arguments(call, "hidden_states")
    return _in_patches(model, latents.shape[2:])


def of_frames(model: torch.nn.Module, call: Mapping[str, Any]) -> Grid:
    """Reads the grid from latents `[B, T, C, H, W]` and the patch sizes, of which that of time may be None, for 1."""
    (latents,) = _arguments(call, "hidden_states")
    _, frames, _, *sides = latents.shape
    return _in_patches(model, (frames, *sides))


def of_channels_last(model: torch.nn.Module, call: Mapping[str, Any]) -> Grid:
    """Reads the grid from latents `[B, T, H, W, C]` and the patch sizes; sparse attention has another order."""
    (latents,) = _arguments(call, "hidden_states")
    if call.get("sparse_params"):
        raise ValueError("sparse_params put the tokens into another order: use a policy that needs no grid")
    return _in_patches(model, latents.shape[1:4])


def of_items(model: torch.nn.Module, call: Mapping[str, Any]) -> Grid:
    """Reads the grid from latents `[B, items, C, T, H, W]` of a single item, or as `of_video` does."""
    (latents,) = _arguments(call, "hidden_states")
    if latents.ndim != 6:
        return of_video(model, call)
    grid = _in_patches(model, latents.shape[3:])
    _check_single([math.prod(grid)] * latents.shape[1])
    return grid


def of_lengths(model: torch.nn.Module, call: Mapping[str, Any]) -> Grid:
    """Reads the grid from the call's numbers of frames, rows and columns.

    Their product is S for tokens `[B, S, C]`, unless pipelines have joined conditions to these.
    """
    tokens, *grid = _arguments(call, "hidden_states", "num_frames", "height", "width")
    if math.prod(grid) != tokens.shape[1]:
        raise ValueError(
            f"{tokens.shape[1]} tokens do not lie on {'×'.join(map(str, grid))}, which the model was called with; "
            "conditions may have joined them: use a policy that needs no grid, or say it, with grid="
        )
    return tuple(grid)


def of_list(model: torch.nn.Module, call: Mapping[str, Any]) -> Grid:
    """Reads the grid from a list of latents `[C, T, H, W]`, all of one size, and the call's patch sizes.

    A single frame is an image.
    """
    (latents,) = _arguments(call, "x")
    if isinstance(latents[0], list) or len({image.shape[1:] for image in latents}) > 1:
        raise ValueError(
            "images of several sizes or for reference in one call are no single grid: "
            "use a policy that needs none"
        )
    side = call.get("patch_size", 2)
    sides = (call.get("f_patch_size", 1), side, side)
    frames, rows, columns = (length // side for length, side in zip(latents[0].shape[1:], sides, strict=True))
    return (rows, columns) if frames == 1 else (frames, rows, columns)


def of_shapes(model: torch.nn.Module, call: Mapping[str, Any]) -> Grid:
    """Reads the grid from (frames, rows, columns) of every image of every batch entry; the entries are alike."""
    (shapes,) = _arguments(call, "img_shapes")
    images = shapes[0] if isinstance(shapes[0], list) else shapes[:1]
    _check_single([rows * columns for frames, rows, columns in images for _ in range(frames)])
    return tuple(images[0][1:])


def of_shape_list(model: torch.nn.Module, call: Mapping[str, Any]) -> Grid:
    """Reads the grid from (frames, rows, columns) of the one item of every batch entry; the entries must be alike."""
    (shapes,) = _arguments(call, "shape_list")
    _check_single([math.prod(shape) for shape in shapes[0]])
    if len({tuple(shape) for entry in shapes for shape in entry}) > 1:
        raise ValueError(
            "images of several sizes in one call are no single grid: use a policy that needs none"
        )
    return tuple(shapes[0][0])


def of_token_shapes(model: torch.nn.Module, call: Mapping[str, Any]) -> Grid:
    """Reads the grid from (frames, rows, columns) of the one video that is drawn, without sound or actions."""
    (shapes,) = _arguments(call, "vision_token_shapes")
    if call.get("sound_tokens") is not None or call.get("action_tokens") is not None:
        raise ValueError("sound or actions stand among the video's tokens: use a policy that needs no grid")
    _check_single([math.prod(shape) for shape in shapes])
    return tuple(shapes[0])


_read: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _once(tensor: torch.Tensor, read: Callable[[torch.Tensor], Any]) -> Any:
    """Waits for the device, and reads the tensor once: pipelines give the same one in every step.

    A tensor of inference mode is read each time, because it does not tell when somebody writes into it.
    """
    if tensor.is_inference():
        return read(tensor)
    version = tensor._version  # raised by writing into it
    if tensor not in _read or _read[tensor][0] != version:
        _read[tensor] = version, read(tensor)
    return _read[tensor][1]


def of_positions(model: torch.nn.Module, call: Mapping[str, Any]) -> Grid:
    """Reads the grid from (image, row, column, …) of every token: `[tokens, 3 or more]`, perhaps with a batch in front.

    It waits for the device, once for each tensor.
    """
    (positions,) = _arguments(call, "img_ids")
    return _once(positions, _of_positions)


def of_joint_positions(model: torch.nn.Module, call: Mapping[str, Any]) -> Grid:
    """Reads the grid as `of_positions` does, from positions in which the text's stand before the image's."""
    tokens, positions = _arguments(call, "hidden_states", "position_ids")
    return _once(positions, lambda positions: _of_positions(positions[-tokens.shape[1] :]))


def _of_positions(positions: torch.Tensor) -> Grid:
    image, row, column = (positions if positions.ndim == 2 else positions[0]).cpu().float()[:, :3].unbind(1)
    _check_single(image.unique(return_counts=True)[1].tolist())
    # Not the number of different positions: in bf16, the pipelines' dtype, those above 256 coincide.
    columns = int((row == row[0]).cumprod(0).sum())
    rows = len(row) // columns
    if rows * columns == len(row):
        row, column = row.view(rows, columns), column.view(rows, columns)
        rises = (row.diff(dim=0) >= 0).all() and (column.diff(dim=1) >= 0).all()
        if rises and (row == row[:, :1]).all() and (column == column[:1]).all():
            return rows, columns
    raise ValueError(
        f"img_ids of {image.numel()} tokens, {columns} of them in the first row, are no grid, row by row: "
        "use a policy that needs none"
    )


def _check_single(tokens: Sequence[int]) -> None:
    """Raises ValueError for the tokens of more than one image."""
    if len(tokens) > 1:
        raise ValueError(
            f"{len(tokens)} images in one call, of {' + '.join(map(str, tokens))} tokens, are no single grid: "
            "use a policy that needs none"
        )


def _in_patches(model: torch.nn.Module, sides: Sequence[int]) -> Grid:
    """Divides the latents' sides by the patch sizes, which the configuration has in one entry or in two."""
    patch = _config(model).patch_size
    patch = (_config(model).get("patch_size_t") or 1, patch, patch) if isinstance(patch, int) else patch
    if len(sides) != len(patch):
        raise ValueError(
            f"hidden_states of {len(sides)} sides, not {len(patch)}, do not tell their grid: say it, with grid="
        )
    return tuple(length // side for length, side in zip(sides, patch, strict=True))


def _arguments(call: Mapping[str, Any], *names: str) -> list[Any]:
    if missing := [name for name in names if call.get(name) is None]:
        raise ValueError(
            f"the model was called without {', '.join(missing)}, which tell its grid: say it, with grid="
        )
    return [call[name] for name in names]


def _config(model: torch.nn.Module) -> Any:
    return getattr(model, "nets", [model])[0].config  # of several ControlNets in one, the first's
