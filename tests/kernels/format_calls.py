"""Whole attention calls whose numbers are prepared or stored in other ways than those of `NAMED_CALLS`."""

import torch

from tests.kernels.calls import Call

FORMAT_CALLS = [
    Call(384, 384, 64, smooth_k=False, name="with-the-mean-of-k"),
    Call(300, 300, 128, smooth_v=False, high="bf16", low="int8", masks_keys=True, name="with-the-mean-of-v"),
    Call(300, 300, 64, smooth_k=False, smooth_v=False, low="int8", means=2, name="with-both-means"),
    Call(384, 384, 64, rotation="hadamard32", has_norms=True, name="rotated-32"),
    Call(
        300,
        300,
        80,
        rotation="hadamard16",
        high="int8",
        low="fp8",
        masks_keys=True,
        name="rotated-16-key-mask",
    ),
    Call(
        300,
        300,
        128,
        rotation="head_dim",
        high="bf16",
        low="int8",
        has_rope=True,
        heads=4,
        name="rotated-heads",
    ),
    Call(257, 257, 256, rotation="head_dim", low="mxfp6_e3m2", is_causal=True, name="rotated-head-dim-256"),
    Call(640, 640, 64, rotation="head_dim", high="bf16", low="int8", means=3, name="rotated-means-int8"),
    Call(
        500,
        500,
        32,
        rotation="head_dim",
        low="mxfp4",
        means=2,
        has_token_order=True,
        name="rotated-means-order",
    ),
    Call(384, 384, 64, high="mxint8", low="mxint4", name="mxint8-mxint4"),
    Call(300, 300, 128, high="nvint4", low="mxint6", has_token_order=True, name="nvint4-mxint6-order"),
    Call(257, 257, 80, high="int8_tile", low="int4", rotation="hadamard16", name="int8-tile-int4"),
    Call(500, 500, 64, high="bf16", low="int8_tile", means=2, masks_keys=True, name="int8-tile-means"),
    Call(300, 300, 72, high="mxint8", low="mxint8/bf16", is_causal=True, name="mxint8-everywhere"),
    Call(400, 400, 64, high="bf16", low="int8", rotation="none/head_dim", means=2, name="rotated-v"),
    Call(
        400,
        400,
        80,
        high="int4",
        low="mxint4",
        rotation="hadamard16/hadamard16",
        means=2,
        masks_keys=True,
        has_token_order=True,
        dtype=torch.bfloat16,
        name="packed-rotated-v",
    ),
]
