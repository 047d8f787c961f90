"""Forward calls: what belongs to one is not seen by another, in other threads, after it, or during a backward pass."""

import threading

import pytest
import torch
from diffusers import FluxPipeline
from diffusers.models.attention_dispatch import AttentionBackendName

from dma_diffusers import apply, report, restore
from dma_diffusers.checkpoints import Carrying
from dma_diffusers.decision import WANTS_GRADIENTS
from dma_diffusers.internals import active_backend
from tests import tiny_pipelines
from tests.dma_diffusers import tiny_models
from tests.kernels.calls import relative_l2
from tests.tiny_pipelines import draw

# A configuration, and what two calls have of their own: tokens of text, rows of the picture, and noise level.
PAIRS = {
    "two lengths of text": ({"window": 0, "sink": 0}, [(16, 12, 0.5), (300, 12, 0.5)]),
    "two sizes": (
        {"policy": "neighborhood(window=5x5)", "dense_above_sigma": 1, "dense_layers": ()},
        [(21, 12, 0.5), (21, 16, 0.5)],
    ),
    "two noise levels": ({"window": 0, "sink": 0, "dense_above_sigma": 0.5}, [(21, 12, 0.9), (21, 12, 0.1)]),
}


def flux_call(text: int, rows: int, sigma: float) -> dict:
    torch.manual_seed(text + rows)
    return {
        "hidden_states": torch.randn(1, rows * 25, 4),
        "encoder_hidden_states": torch.randn(1, text, 8),
        "pooled_projections": torch.randn(1, 8),
        "timestep": torch.tensor([sigma]),
        "img_ids": FluxPipeline._prepare_latent_image_ids(1, rows, 25, "cpu", torch.float32),
        "txt_ids": torch.zeros(text, 3),
        "return_dict": False,
    }


@torch.no_grad()
@pytest.mark.parametrize("name", PAIRS)
def test_threads_share_one_transformer(name):
    fields, calls = PAIRS[name]
    model = tiny_models.make("flux").model
    calls = [flux_call(*call) for call in calls]
    apply(model, min_length=0, **fields)
    alone = [model(**call)[0] for call in calls]
    errors: list[float] = []
    barrier = threading.Barrier(2)

    @torch.no_grad()
    def work(call: dict, expected: torch.Tensor) -> None:
        barrier.wait()
        for _ in range(10):
            errors.append(float((model(**call)[0] - expected).norm() / expected.norm()))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(calls, alone, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 20 and max(errors) < 1e-5  # the call of the other thread would be off by 1e-4
    receipt = report(model)
    assert {module.intercepted for module in receipt.modules} == {22}
    dense = {next(iter(module.by_entry.values()), 0) for module in receipt.modules}
    assert dense == {11 if "noise" in name else 0}


@torch.no_grad()
def test_a_forward_without_its_call_is_stock_and_says_what_to_do():
    case = tiny_models.make("flux")
    (text,) = case.texts(1)
    call = case.call(text)
    stock = case.run(text)
    apply(case.model, min_length=0)
    ours = case.run(text)
    direct = case.model.forward(**call, return_dict=False)[0]
    assert torch.equal(direct, stock) and not torch.equal(ours, stock)
    (reason,) = {reason for module in report(case.model).modules for reason in module.fallbacks}
    assert "call the model itself, not its forward" in reason
    assert torch.equal(case.run(text), ours)


@torch.no_grad()
def test_a_call_that_fails_ends():
    case = tiny_models.make("flux")
    apply(case.model, min_length=0)
    context = next(iter(case.model.modules())).transformer_blocks[0].attn.processor.interception.forward
    case.model.proj_out.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        case.run(case.texts(1)[0])
    assert not context.call.is_running


@torch.inference_mode()
def test_positions_that_are_rewritten_in_place_are_read_again():
    case = tiny_models.make("flux")
    apply(case.model, policy="neighborhood(window=5x5)", dense_layers=(), min_length=0)
    positions = torch.zeros(300, 3)
    case.inputs["img_ids"] = positions
    context = case.model.transformer_blocks[0].attn.processor.interception.forward
    for rows, columns in ((12, 25), (25, 12)):
        grid = FluxPipeline._prepare_latent_image_ids(1, rows, columns, "cpu", torch.float32)
        positions.copy_(grid)
        case.run(case.texts(1)[0])
        assert context.grid == (rows, columns)


def gradients(model: torch.nn.Module, between=lambda: None) -> list[torch.Tensor]:
    """The gradients of a training step, with something done between its forward and its backward pass."""
    model.zero_grad()
    call = flux_call(21, 12, 0.5)
    call["hidden_states"].requires_grad_()
    out = model(**call)[0]
    between()
    out.square().sum().backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def enable_checkpoints(model: torch.nn.Module, reentrant: bool) -> None:
    model.enable_gradient_checkpointing(
        lambda function, *args: torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=reentrant)
    )


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_checkpoints_give_the_gradients_that_there_are_without_them(reentrant, training):
    model = tiny_models.make("flux").model.train(training)
    apply(model, min_length=0, window=0, sink=0)
    plain = gradients(model)
    enable_checkpoints(model, reentrant)

    @torch.no_grad()
    def validate() -> None:  # with more text; the blocks that run anew belong to the call before
        model(**flux_call(300, 12, 0.5))

    found = gradients(model, validate)
    assert len(found) == len(plain)
    # Reentrant checkpoints add the gradients of a text's embedding in another order.
    assert all(relative_l2(own, other) < 1e-6 for own, other in zip(found, plain, strict=True))
    receipt = report(model)
    assert not any(module.fallbacks for module in receipt.modules)
    assert all(module.intercepted == 4 for module in receipt.modules)
    restore(model)
    assert not isinstance(model._gradient_checkpointing_func, Carrying)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_remember_no_pairs_of_an_earlier_step(reentrant):
    """The second run of a checkpoint finds the important pairs anew, so the first run has to do so, too."""
    model = tiny_models.make("flux").model
    policy = "importance(budget=0.3, beyond=skip)"
    apply(model, min_length=0, high="bf16", low="bf16", policy=policy, dense_layers=(), dense_above_sigma=1)
    call = flux_call(21, 24, 0.5)
    earlier = call | {"hidden_states": -call["hidden_states"], "timestep": torch.tensor([0.6])}

    def of_latents() -> torch.Tensor:
        with torch.no_grad():
            model(**earlier)
        latents = call["hidden_states"].clone().requires_grad_()
        model(**call | {"hidden_states": latents})[0].square().sum().backward()
        return latents.grad

    plain = of_latents()
    enable_checkpoints(model, reentrant)
    assert relative_l2(of_latents(), plain) < 1e-6


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_that_are_not_the_models_own_are_refused(reentrant, monkeypatch):
    model = tiny_models.make("flux").model.train()
    for block in model.transformer_blocks:

        def anew(forward=block.forward, **given):
            def run(*values):
                return forward(**dict(zip(given, values, strict=True)))

            return torch.utils.checkpoint.checkpoint(run, *given.values(), use_reentrant=reentrant)

        monkeypatch.setattr(block, "forward", anew)
    assert gradients(model)
    apply(model, min_length=0, lowering="fastest")
    assert gradients(model)
    apply(model, min_length=0)
    with pytest.raises(ValueError, match=r"call the model's enable_gradient_checkpointing\(\) instead"):
        gradients(model)


def test_training_falls_back_where_only_what_is_faster_was_asked_for(monkeypatch):
    monkeypatch.setattr("dma_diffusers.config.why_not_faster", lambda *_: "")
    model = tiny_models.make("flux").model.train()
    enable_checkpoints(model, reentrant=False)
    stock = gradients(model)
    apply(model, min_length=0, lowering="fastest")
    assert all(map(torch.equal, gradients(model), stock)) and stock
    assert {reason for module in report(model).modules for reason in module.fallbacks} == {WANTS_GRADIENTS}


def test_nothing_of_the_process_changes_during_a_call():
    pipe = tiny_pipelines.cosmos()
    stock = draw(pipe)
    apply(pipe, min_length=0)
    seen = set()
    hook = pipe.transformer.register_forward_hook(lambda *_: seen.add(active_backend()[0]))
    attention = pipe.transformer.transformer_blocks[0].attn1
    attention.to_out[0].register_forward_pre_hook(lambda *_: seen.add(active_backend()[0]))
    from diffusers.models.attention_dispatch import attention_backend

    with attention_backend(AttentionBackendName.FLEX):
        ours = draw(pipe)
    hook.remove()
    assert seen == {AttentionBackendName.FLEX}
    assert active_backend()[0] is AttentionBackendName.NATIVE
    assert not torch.equal(ours, stock)
    assert all(module.intercepted for module in report(pipe).modules if module.policy)
