"""The comparison of stock and DMA while another tool works on the same pipeline."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch.nn.functional import scaled_dot_product_attention

from dma_diffusers import apply, report, restore
from dma_diffusers.kernels import operator
from dma_diffusers.kernels.call import Call
from dma_diffusers.kernels.quantiser import reference
from tests.dma_diffusers import tiny_models
from tests.tiny_pipelines import draw

LOW = {"min_length": 0, "policy": "dense(everywhere=low)"}

Steps = Sequence[tuple[Callable[[Any], Any], int]]
"""Each step changes the pipeline; the operator's calls in one drawing after it come with it."""


def nothing(pipe: Any) -> None:
    """This step changes nothing."""


@contextmanager
def exact_operator() -> Iterator[None]:
    """Run the operator's calls in full precision, whatever processors they come from."""

    def attend(query, key, value, key_mask, scale, is_causal, norms=None, q_rope=None, k_rope=None, **_):
        call = Call(query, key, value, q_rope=q_rope, k_rope=k_rope, norms=norms)
        query, key = reference.changed_q(call).to(query.dtype), reference.changed_k(call).to(key.dtype)
        mask = None if key_mask is None else key_mask[:, None, None]
        gqa = query.shape[1] != key.shape[1]
        out = scaled_dot_product_attention(
            query, key, value, mask, is_causal=is_causal, scale=scale, enable_gqa=gqa
        )
        return operator.Result(out, torch.empty(0), torch.empty(0, dtype=torch.int32))

    with mock.patch.object(operator, "attention", attend):
        yield


@contextmanager
def counted_operator(calls: int) -> Iterator[None]:
    """Check that the operator, or what stands in for it, is called so many times."""
    with mock.patch.object(operator, "attention", side_effect=operator.attention) as spy:
        yield
    assert spy.call_count == calls


def combine(
    build: Callable[[], Any],
    steps: Steps,
    run: Callable[[Any], torch.Tensor] = draw,
    applied_after: int = 0,
) -> None:
    """Draw after each step, and check that DMA beside the tool is stock beside the tool.

    applied_after: DMA is applied after so many steps.
    With an exact operator each drawing is stock's, bit for bit, and with low bits it is another. The operator is called
    as often as expected, and the report says so. A restored pipeline draws stock's last drawing again.
    """
    pipe, expected = build(), []
    for step, _ in steps:
        step(pipe)
        expected.append(run(pipe))
    for is_exact in (True, False):
        pipe, intercepted = build(), 0
        for index, (step, calls) in enumerate(steps):
            if index == applied_after:
                apply(pipe, **LOW)
            step(pipe)
            if index < applied_after:
                continue
            with exact_operator() if is_exact else nullcontext(), counted_operator(calls):
                drawn = run(pipe)
            intercepted += calls
            if is_exact:
                assert torch.equal(drawn, expected[index])
            else:
                assert (drawn - expected[index]).norm() > 1e-5 * expected[index].norm()
        assert sum(module.intercepted for module in report(pipe).modules) == intercepted
        restore(pipe)
        assert torch.equal(run(pipe), expected[-1])


def of_model(name: str) -> tuple[Callable[[], torch.nn.Module], Callable[[torch.nn.Module], torch.Tensor]]:
    """Return how a tiny model without a pipeline is built, and how it is run."""
    case = tiny_models.make(name)
    (text,) = case.texts(1)

    @torch.no_grad()
    def run(model: torch.nn.Module) -> torch.Tensor:
        case.model = model
        return case.run(text)

    return lambda: tiny_models.make(name).model, run
