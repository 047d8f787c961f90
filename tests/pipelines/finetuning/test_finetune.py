"""Runs of fine-tuning: they learn, go on exactly, save what Diffusers loads, and say in a line what is wrong."""

import json
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import DistributedType
from diffusers import FluxPipeline, FluxTransformer2DModel, WanPipeline, WanTransformer3DModel
from PIL import Image

from dma_diffusers import apply, report, restore
from dma_diffusers import finetune as precision
from dma_diffusers.config import DMAConfig
from dma_diffusers.pipelines.finetuning import finetune as module
from dma_diffusers.pipelines.finetuning import trainer
from dma_diffusers.pipelines.finetuning.data import Example
from dma_diffusers.pipelines.finetuning.finetune import Watch, finetune
from dma_diffusers.pipelines.finetuning.request import Request
from dma_diffusers.pipelines.finetuning.save import save_trained
from dma_diffusers.pipelines.finetuning.sheets import Sheets
from dma_diffusers.pipelines.finetuning.target import trainable
from dma_diffusers.pipelines.finetuning.trainer import Settings, Trainer
from dma_diffusers.pipelines.generate import draw
from dma_diffusers.pipelines.load import load_pipeline
from tests.pipelines.saved_flux import CALL, save_flux
from tests.tiny_pipelines import CALLS, wan, wan22

PROMPTS = ("a cat", "a dog")
SKIPPING = "skip_softmax(threshold=0.01)"
LAST_GOOD = "the last good checkpoint is .*step-00000001; lower --lr, in another folder"
SETTINGS = Settings(batch=2, learning_rate=1e-3, warmup=0)


def silent(title: str, done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_flux(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def request_(model):
    return Request(model, CALL, PROMPTS, linears="qat", settings=SETTINGS)


DRAWN = []  # the step, and a number that was drawn before it from torch's own generator
STOCK = Trainer.advance


def draws(self):
    DRAWN.append((self.step, float(torch.rand(1))))
    return STOCK(self)


def stops(self):
    if self.step == 3:
        raise KeyboardInterrupt
    return draws(self)


@pytest.fixture(scope="module")
def run(request_, tmp_path_factory):
    """A run of four steps that nothing stopped."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "advance", draws)
        result = finetune(request_, 4, folder, Watch(checkpoint_every=2, sheet_every=3, samples=1), silent)
    return folder, result


def weights(folder):
    return FluxTransformer2DModel.from_pretrained(folder / "transformer").state_dict()


def test_a_run_that_was_stopped_goes_on_bit_for_bit(run, request_, tmp_path, monkeypatch):
    """It is stopped before its fourth step, and goes on from the checkpoint after the second."""
    folder, whole = run
    unbroken = list(DRAWN)
    DRAWN.clear()
    for advance in (stops, draws):
        torch.manual_seed(99)  # another process would have any state
        monkeypatch.setattr(Trainer, "advance", advance)
        with pytest.raises(KeyboardInterrupt) if advance is stops else nullcontext():
            result = finetune(request_, 4, tmp_path, Watch(checkpoint_every=2), silent)
    assert unbroken[:3] + unbroken[2:] == DRAWN  # the third step was made twice
    assert result["loss"] == whole["loss"]
    one, other = weights(tmp_path), weights(folder)
    assert all(one[name].equal(other[name]) for name in other)
    states = [
        torch.load(each / "checkpoints/step-00000004/state.pt", weights_only=True)
        for each in (tmp_path, folder)
    ]
    for name in ("weights", "optimizer", "average"):
        torch.testing.assert_close(states[0][name], states[1][name], rtol=0, atol=0)


def test_the_result_loads_in_stock_diffusers_and_draws(run, model, request_):
    folder, result = run
    trained = FluxTransformer2DModel.from_pretrained(folder / "transformer")
    stock = FluxTransformer2DModel.from_pretrained(model / "transformer")
    changed = [
        name for name, value in trained.state_dict().items() if not value.equal(stock.state_dict()[name])
    ]
    assert trained.state_dict().keys() == stock.state_dict().keys() and len(changed) > 10
    pipe = FluxPipeline.from_pretrained(model, transformer=trained)
    pipe.set_progress_bar_config(disable=True)
    assert draw(pipe, ["a cat"], [0], CALL).frames.shape == (1, 1, 48, 40, 3)
    policy = json.loads((folder / "policy.json").read_text())
    assert policy["evidence"]["linears"] == "qat" and policy["evidence"]["steps"] == 4
    config = DMAConfig.from_file(folder / "policy.json")
    assert config.lowering == "stock" and config.linears == "qat"
    apply(pipe, config)
    drawn = draw(pipe, ["a cat"], [0], CALL).latents
    receipts = [receipt for receipt in report(pipe).linears if receipt.formats]
    assert len(receipts) > 10 and {receipt.formats for receipt in receipts} == {("mxfp4",)}
    restore(pipe)
    precision.prepare(pipe.transformer, "qat")
    assert draw(pipe, ["a cat"], [0], CALL).latents.equal(drawn)
    assert (folder / "samples-000003.png").is_file() and (folder / "samples-000004.png").is_file()
    lines = [json.loads(line) for line in (folder / "loss.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == result["loss"] and lines[-1]["step"] == 4
    assert sorted(path.name for path in folder.glob("checkpoints/*")) == ["step-00000002", "step-00000004"]


def state_of(folder, step):
    return torch.load(folder / f"checkpoints/step-{step:08d}/state.pt", weights_only=True)


def test_the_averages_are_saved(run):
    folder, _ = run
    saved, state = FluxTransformer2DModel.from_pretrained(folder / "transformer"), state_of(folder, 4)
    averages = state["average"]["shadow_params"]
    assert all(map(torch.equal, saved.parameters(), averages))
    assert not all(value.equal(state["weights"][name]) for name, value in saved.named_parameters())


def test_gradients_are_clipped(request_, tmp_path):
    """AdamW's first moment after one step is a tenth of the gradient."""
    norms = []
    for clip in (1e-3, 0.0):
        folder = tmp_path / str(clip)
        finetune(replace(request_, settings=replace(SETTINGS, clip=clip)), 1, folder, Watch(), silent)
        moments = [each["exp_avg"] for each in state_of(folder, 1)["optimizer"]["state"].values()]
        norms.append(float(torch.cat([moment.flatten() for moment in moments]).norm()))
    assert norms[0] == pytest.approx(1e-4, rel=1e-3) and norms[1] > 2e-4


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "x.png"
    Image.linear_gradient("L").convert("RGB").save(path)
    return Example(path, "a gradient")


@pytest.mark.parametrize("objective", ["distillation", "flow matching"])
def test_both_objectives_lower_the_loss_of_a_fixed_batch(objective, request_, picture, tmp_path, monkeypatch):
    """Steps on the very same batch, whose noise is the same, can only be learning."""
    first, stock = [], Trainer.batch

    def same(self, number):
        if not first:
            first.append(stock(self, number))
        return first[0]

    monkeypatch.setattr(Trainer, "batch", same)
    rate = 1e-4 if objective == "distillation" else 1e-3
    asked = replace(request_, settings=replace(SETTINGS, learning_rate=rate, ema=0, clip=0))
    if objective == "flow matching":
        asked = replace(asked, prompts=(), examples=(picture,))
    losses = finetune(asked, 4, tmp_path, Watch(0), silent)["loss"]
    assert losses[-1] < 0.9 * losses[0]


def test_lora_trains_adapters_alone_and_loads(request_, model, tmp_path):
    asked = replace(request_, lora_rank=2, settings=replace(SETTINGS, learning_rate=0.05))
    result = finetune(asked, 2, tmp_path, Watch(checkpoint_every=1), silent)
    assert result["saved"] == str(tmp_path / "lora")
    state = torch.load(tmp_path / "checkpoints/step-00000002/state.pt", weights_only=True)
    assert state["weights"] and all("lora_" in name for name in state["weights"])
    pipe = load_pipeline(model)
    before = draw(pipe, ["a cat"], [0], CALL).latents
    pipe.load_lora_weights(tmp_path / "lora")
    adapted = draw(pipe, ["a cat"], [0], CALL).latents
    assert not adapted.equal(before)
    apply(pipe, DMAConfig.from_file(tmp_path / "policy.json"))
    rounded = {receipt.module for receipt in report(pipe).linears if receipt.formats == ("mxfp4",)}
    assert "transformer.transformer_blocks.0.attn.to_q" in rounded
    assert not draw(pipe, ["a cat"], [0], CALL).latents.equal(adapted)
    restore(pipe)
    assert draw(pipe, ["a cat"], [0], CALL).latents.equal(adapted)


def test_adapters_begin_alike_in_every_run(request_, model):
    found = []
    for state in (1, 2):
        torch.manual_seed(state)
        transformer = FluxTransformer2DModel.from_pretrained(model / "transformer")
        module.prepare(transformer, replace(request_, lora_rank=2))
        found.append({name: value for name, value in transformer.named_parameters() if "lora_A" in name})
    assert found[0] and all(value.equal(found[1][name]) for name, value in found[0].items())


def test_adapters_of_the_second_transformer_are_saved(picture, tmp_path):
    pipe = wan22()
    module.prepare(pipe.transformer_2, Request("wan", {}, examples=(picture,), lora_rank=2))
    save_trained(pipe, "transformer_2", None, None, True, {}, tmp_path)
    again = wan22()
    again.load_lora_weights(tmp_path / "lora", load_into_transformer_2=True)
    names = [name for name, _ in again.transformer_2.named_parameters() if "lora_" in name]
    assert names and not any("lora_" in name for name, _ in again.transformer.named_parameters())


def test_attention_and_linear_layers_learn_together(request_, tmp_path):
    """Attention runs at low precision in training as well: the loss without a step is that of drawing with it."""
    attention = DMAConfig(low="mxfp4", window=0, sink=0, protect_text=False)
    asked = replace(request_, attention=attention, settings=replace(SETTINGS, learning_rate=1e-4))
    alone, both = (
        finetune(replace(asked, linears=linears), 2, tmp_path / str(linears), Watch(0), silent)["loss"]
        for linears in (None, "qat")
    )
    assert 1e-7 < alone[0] < both[0] and both[1] < both[0]
    policy = DMAConfig.from_file(tmp_path / "qat" / "policy.json")
    assert policy.low == "mxfp4" and policy.window == 0 and policy.weights and policy.linears == "qat"
    assert DMAConfig.from_file(tmp_path / "None" / "policy.json").linears is None


def test_attention_that_never_trained_at_low_precision_is_said(request_, tmp_path):
    long, short = (
        finetune(
            replace(request_, attention=DMAConfig(min_length=fewest)),
            1,
            tmp_path / str(fewest),
            Watch(0),
            silent,
        )
        for fewest in (10_000, 0)
    )
    assert long["notes"] == ["attention trained at full precision: fewer than 10000 keys"]
    assert short["notes"] == []


def test_gradient_checkpointing_changes_nothing(run, request_, tmp_path):
    asked = replace(request_, gradient_checkpointing=True)
    assert finetune(asked, 2, tmp_path, Watch(0), silent)["loss"] == run[1]["loss"][:2]


def test_a_pipeline_of_clips_learns_and_draws_again(tmp_path):
    """The clips are guided, and attention takes far tiles by their means."""
    stock = wan()
    stock.save_pretrained(tmp_path / "model")
    call = CALLS[WanPipeline] | {
        "num_inference_steps": 2,
        "guidance_scale": 4.0,
        "negative_prompt": "blurred",
    }
    attention = DMAConfig(
        high="bf16",
        low="int8",
        policy="importance(budget=0.3, beyond=mean)",
        dense_layers=(),
        dense_above_sigma=1,
    )
    request = Request(tmp_path / "model", call, PROMPTS, attention=attention, settings=SETTINGS)
    result = finetune(request, 2, tmp_path / "run", Watch(), silent)
    assert len(result["loss"]) == 2 and not result["notes"]
    trained = WanTransformer3DModel.from_pretrained(tmp_path / "run/transformer")
    own = stock.transformer.state_dict()
    assert sum(not value.equal(own[name]) for name, value in trained.state_dict().items()) > 10
    stock.transformer = trained
    apply(stock, DMAConfig.from_file(tmp_path / "run/policy.json"))
    frames = draw(stock, ["a cat"], [0], call).frames
    assert frames.shape == (1, 9, 144, 176, 3) and frames.std() > 0
    # Two blocks in two steps, with the prompt and with the negative one.
    assert sum(receipt.intercepted for receipt in report(stock).modules) == 8


def test_sheets_of_more_samples_are_drawn_anew(run, model):
    pipe = load_pipeline(model)
    assert [len(Sheets(pipe, PROMPTS[:count], CALL, run[0]).exact) for count in (1, 2)] == [1, 2]


def test_another_configuration_is_refused_with_its_differences(run, request_):
    other = replace(request_, linears="quartet", settings=replace(SETTINGS, batch=3))
    with pytest.raises(ValueError, match="batch was 2, now 3; linears was 'qat', now 'quartet'"):
        finetune(other, 5, run[0], Watch(), silent)


@pytest.mark.parametrize(("breaks", "step", "message"), [
    (lambda loss: loss * torch.nan, 2, f"the loss is nan .* in step 2: {LAST_GOOD}"),
    (lambda loss: loss + (0 * loss).sqrt(), 2, rf"the loss is \d.* norm nan in step 2: {LAST_GOOD}"),
    (lambda loss: loss * torch.nan, 1, "in step 1: there is no checkpoint before it; lower --lr, in another folder"),
], ids=["loss", "gradient", "first step"])  # fmt: skip
def test_what_is_not_finite_stops_and_names_the_last_good_checkpoint(
    breaks, step, message, request_, tmp_path, monkeypatch
):
    stock, calls = trainer.velocity_loss, []

    def broken(model, call):
        calls.append(call)
        loss = stock(model, call)
        return breaks(loss) if len(calls) == step else loss

    monkeypatch.setattr(trainer, "velocity_loss", broken)
    with pytest.raises(ValueError, match=message):
        finetune(request_, 4, tmp_path, Watch(checkpoint_every=1), silent)


def test_out_of_memory_says_what_to_lower(request_, tmp_path, monkeypatch):
    def full(self):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Trainer, "advance", full)
    with pytest.raises(RuntimeError, match="out of memory with --batch 2: lower it and raise --accumulate"):
        finetune(request_, 1, tmp_path, Watch(), silent)


@pytest.mark.parametrize(("changes", "message"), [
    ({"component": "transformer_2"}, "FluxPipeline has no transformer_2: give --component transformer"),
    ({"linears": "int3"}, "unknown linears 'int3'"),
    ({"prompts": ()}, "give prompts to distil from full precision, or a folder of data"),
    ({"linears": None}, "nothing is low-bit"),
    ({"attention": DMAConfig(linears="fp8")}, "give linear layers by --linears"),
    ({"attention": DMAConfig.preset("auto")}, "lowering=fastest leaves calls that train to stock"),
    ({"attention": DMAConfig(policy=SKIPPING)}, "threshold has no backward.*every other policy"),
    ({"attention": DMAConfig(schedule=f"sigma>0.5: diagonal(); {SKIPPING}")}, "threshold has no backward"),
    ({"attention": DMAConfig(modules={"attn": {"policy": SKIPPING}})}, "threshold has no backward"),
])  # fmt: skip
def test_what_cannot_be_trained_is_said(changes, message, request_, tmp_path):
    with pytest.raises(ValueError, match=message):
        finetune(replace(request_, **changes), 1, tmp_path, Watch(), silent)
    assert not (tmp_path / "settings.json").exists()


def test_split_weights_are_not_trained(request_, tmp_path, monkeypatch):
    monkeypatch.setattr(
        module, "Accelerator", lambda **given: SimpleNamespace(distributed_type=DistributedType.FSDP)
    )
    with pytest.raises(ValueError, match="accelerate is set to FSDP: launch it with --multi_gpu"):
        finetune(request_, 1, tmp_path, Watch(), silent)


def test_a_pipeline_without_a_transformer_or_room_for_it_is_not_trained():
    layer = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="has no transformer: there is nothing here to fine-tune"):
        trainable(SimpleNamespace(components={"vae": layer}), "transformer", lora=False)
    pipe = SimpleNamespace(components={"transformer": layer})
    assert trainable(pipe, "transformer", lora=False) is layer
    add_hook_to_module(layer, ModelHook())
    with pytest.raises(
        ValueError, match="transformer has no room on this GPU beside the rest of SimpleNamespace"
    ):
        trainable(pipe, "transformer", lora=False)


def test_a_pipeline_that_saves_no_adapters_trains_none():
    pipe = SimpleNamespace(components={"transformer": torch.nn.Linear(2, 2)})
    with pytest.raises(ValueError, match="can't save LoRA adapters: leave --lora-rank out"):
        trainable(pipe, "transformer", lora=True)


class OwnClass(torch.Tensor):
    """A tensor whose class is its own, as torchao's weights are, with a dtype of 16 bits or more."""


@pytest.mark.parametrize("weight", [
    torch.zeros(2, dtype=torch.int8), torch.zeros(2, dtype=torch.float8_e4m3fn), torch.zeros(2).as_subclass(OwnClass),
], ids=["int8", "fp8", "subclass"])  # fmt: skip
def test_a_quantised_transformer_is_not_trained(weight, request_, tmp_path, monkeypatch):
    def quantised(*args, **kwargs):
        pipe = load_pipeline(*args, **kwargs)
        codes = torch.nn.Parameter(weight, requires_grad=False)
        pipe.transformer.x_embedder.register_parameter("codes", codes)
        return pipe

    monkeypatch.setattr(module, "load_pipeline", quantised)
    with pytest.raises(ValueError, match=r"the weights of transformer are quantised \(x_embedder.codes\)"):
        finetune(request_, 1, tmp_path, Watch(), silent)
