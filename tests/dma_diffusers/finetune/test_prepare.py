"""Preparing a model for fine-tuning: which layers train at low precision, what is saved, and the way back."""

import builtins
import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from dma_diffusers import DMAConfig, apply, quantize_linears, report, save_linears
from dma_diffusers import restore as restore_all
from dma_diffusers.finetune import QuartetLinear, prepare, restore
from dma_diffusers.finetune import module as finetune_module
from dma_diffusers.kernels.training import linear
from dma_diffusers.kernels.training.linear import train_linear
from dma_diffusers.kernels.training.recipe import LINEARS, recipe_of
from dma_diffusers.linears.exclusions import choose
from tests.dma_diffusers import tiny_models
from tests.kernels.calls import relative_l2


class Block(torch.nn.Module):
    """A residual block of two linear layers."""

    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(32, 64), torch.nn.Linear(64, 32, bias=False)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(x)))


def make_plain() -> torch.nn.Module:
    """A model that is none of Diffusers', with an embedding and a projection of other widths."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 32), Block(), Block(), torch.nn.Linear(32, 3))


def quartet_layers(model) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, QuartetLinear)]


def gradients(model, x) -> list[torch.Tensor]:
    model(x).square().sum().backward()
    found = [p.grad for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    return found


@pytest.mark.parametrize(
    ("linears", "format_"), [("qat", "mxfp4"), ("quartet2", "nvfp4"), ("mxint8", "mxint8")]
)
def test_a_configuration_draws_with_the_numbers_of_training(linears, format_):
    """`apply` rounds as `prepare` did; a method may take its place, and the very same weights come back."""
    case = tiny_models.flux()
    model, (text,) = case.model, case.texts(1)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        stock = case.run(text)
        prepare(model, linears)
        trained = case.run(text)
        restore(model)
        for _ in range(2):  # the second time, all is as asked for
            apply(model, DMAConfig.preset("exact", linears=linears))
        assert case.run(text).equal(trained) and not trained.equal(stock)
        assert {receipt.formats for receipt in report(model).linears if receipt.formats} == {(format_,)}
        with pytest.raises(ValueError, match="quantised already: call"):
            prepare(model, linears)
        with pytest.raises(ValueError, match=f"linears='{linears}' rounds the model's own weights"):
            save_linears(model, "linears.safetensors")
        apply(model, DMAConfig.preset("exact", linears="fp8"))
        assert not quartet_layers(model) and not case.run(text).equal(trained)
        apply(model, DMAConfig.preset("exact", linears=linears))
        assert case.run(text).equal(trained)
        restore_all(model)
        assert case.run(text).equal(stock) and not quartet_layers(model)
    assert all(value is parameters[name] for name, value in model.named_parameters())


def test_prepare_takes_the_recipe_of_a_configuration():
    model = tiny_models.flux().model
    config = DMAConfig(low="mxfp4", linears="qat")
    with pytest.raises(ValueError, match="linears='mxint8' here, and 'qat' in the attention's configuration"):
        prepare(model, "mxint8", config)
    found = prepare(model, attention=config)
    assert found.has_attention and list(found.layers) == quartet_layers(model)
    restore(model)
    alone = prepare(model, attention=DMAConfig.preset("exact", linears="qat"))
    assert alone.layers == found.layers and not alone.has_attention


@pytest.mark.parametrize("linears", LINEARS)
def test_a_plain_model_trains_saves_and_comes_back(linears):
    model = make_plain()
    parameters = dict(model.named_parameters())
    found = prepare(model, linears)
    assert list(found.layers) == quartet_layers(model) == ["1.up", "1.down", "2.up", "2.down"]
    assert found.left.keys() == {"0", "3"} and "no multiple of 32" in found.left["3"]
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert all(p is parameters[name] for name, p in model.named_parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x = torch.randn(3, 7, 5)
    target = torch.randn(3, 7, 3)
    losses = []
    for _ in range(20):
        loss = F.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    trained, low = copy.deepcopy(model.state_dict()), model(x)
    restore(model)
    assert quartet_layers(model) == [] and type(model[1].up) is torch.nn.Linear
    assert all(torch.equal(t, trained[name]) for name, t in model.state_dict().items())
    assert not torch.equal(model(x), low)
    stock = make_plain()
    stock.load_state_dict(trained)
    assert torch.equal(model(x), stock(x))
    # A second time does nothing.
    restore(model)
    prepare(model, linears)
    assert torch.equal(model(x), low)


def test_a_transformer_of_diffusers_keeps_what_inference_keeps(tmp_path):
    case = tiny_models.flux()
    model = case.model.train()
    expected = {name for name, layer in choose(model).layers.items() if layer.out_features % 32 == 0}
    found = prepare(model, "quartet", DMAConfig(high="mxfp8", low="mxfp4", policy="diagonal()"))
    assert set(found.layers) == set(quartet_layers(model)) == expected and len(expected) > 10
    assert {"x_embedder", "proj_out", "transformer_blocks.0.norm1.linear"} <= found.left.keys()
    assert report(model).modules
    assert found.lowering.lowering == "reference" and "native: cpu has no" in found.lowering.reason
    assert {each.module for each in report(model).linears} == expected
    assert {(each.formats, each.lowering) for each in report(model).linears} == {(("mxfp4",), "reference")}
    assert "rounded in each call" in str(report(model)) and "in the place of" not in str(report(model))
    # Blocks are alike, so that they are compiled once; layers of one block are not.
    blocks = model.single_transformer_blocks
    assert [b.proj_mlp.seed for b in blocks] == [blocks[0].proj_mlp.seed] * len(blocks)
    assert blocks[0].proj_mlp.seed != blocks[0].proj_out.seed
    model.save_pretrained(tmp_path)
    weights = copy.deepcopy(model.state_dict())
    restore(model)
    assert quartet_layers(model) == [] and not report(model).modules and not report(model).linears
    again = type(model).from_pretrained(tmp_path)
    assert again.state_dict().keys() == weights.keys()
    assert all(torch.equal(t, weights[name]) for name, t in again.state_dict().items())


def test_attention_trains_with_the_products_that_were_asked_for():
    case, found = tiny_models.flux(), {}
    (text,) = case.texts(1)
    for backward in ("bf16", "int8"):
        config = DMAConfig(
            high="bf16", low="int8/bf16", policy="dense(everywhere=low)", min_length=0, backward=backward
        )
        prepare(case.model, attention=config)
        out = case.run(text)
        out.square().sum().backward()
        found[backward] = out, case.model.x_embedder.weight.grad
        assert ("backward=int8" in str(report(case.model))) == (backward == "int8")
        case.model.zero_grad()
        restore(case.model)
    assert torch.equal(found["bf16"][0], found["int8"][0])
    assert 0 < relative_l2(found["int8"][1], found["bf16"][1]) < 0.02


def test_layers_compute_by_their_recipe_and_draw_by_their_own_seed():
    model = make_plain()
    prepare(model, "quartet", rounding="stochastic")
    x = torch.randn(9, 32, requires_grad=True)
    recipe = recipe_of("quartet", "stochastic")
    of_seed = []
    for layer in (model[1].up, model[2].up):
        y = layer(x)
        expected = train_linear(x, layer.weight, layer.bias, recipe, "reference", layer.seed)
        assert torch.equal(y, expected)
        other = train_linear(x, layer.weight, layer.bias, recipe, "reference", layer.seed + 1)
        of_seed += [torch.autograd.grad(z.square().sum(), x)[0] for z in (y, expected, other)]
    assert torch.equal(of_seed[0], of_seed[1]) and not torch.equal(of_seed[0], of_seed[2])
    assert model[1].up.seed != model[2].up.seed


@pytest.mark.parametrize("linears", ["quartet", "quartet2"])
def test_gradient_checkpointing_of_both_kinds_gives_the_same_gradients(linears):
    """Without the state of random numbers being kept, too."""
    rounding = "stochastic" if linears == "quartet" else "nearest"
    model = make_plain()
    prepare(model, linears, rounding=rounding)
    x = torch.randn(2, 9, 5)
    expected = gradients(model, x)
    for reentrant in (False, True):
        for keeps in (False, True):

            def forward(x, reentrant=reentrant, keeps=keeps):
                x = model[0](x)
                for block in (model[1], model[2]):
                    x = checkpoint(block, x, use_reentrant=reentrant, preserve_rng_state=keeps)
                return model[3](x)

            torch.rand(1)
            forward(x).square().sum().backward()
            assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))
            model.zero_grad()


def test_autocast_gives_its_dtype_and_full_gradients():
    model = make_plain()
    prepare(model, "quartet2")
    x = torch.randn(2, 9, 5)
    whole = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model[1].up(torch.randn(4, 32))
        y = model(x)
    assert hidden.dtype == y.dtype == torch.bfloat16
    assert (y - whole).norm() < 0.1 * whole.norm()
    y.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("linears", [None, "qat", "quartet2"])
def test_adapters_train_on_a_frozen_quantised_base(linears):
    peft = pytest.importorskip("peft")
    model = make_plain()
    low = copy.deepcopy(model)
    if linears:
        prepare(low, linears)
    x = torch.randn(4, 5)
    lora = peft.LoraConfig(r=4, target_modules=["up", "down"])
    prepare(model, linears, lora=lora)
    # Adapters begin with nothing.
    assert torch.equal(model(x), low(x))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 8 and all("lora_" in name for name in trained)
    before = copy.deepcopy(model[1].up.base_layer.weight)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(model[1].up.base_layer.weight, before) and not torch.equal(model(x), low(x))
    drawn = model(x)
    restore(model)
    assert type(model[1].up.base_layer) is torch.nn.Linear
    assert torch.equal(model(x), drawn) == (linears is None)


def test_frozen_weights_are_quantised_once_until_they_change(monkeypatch):
    made = []

    def quantise_weight(weight, *arguments):
        made.append(weight)
        return linear.quantise_weight(weight, *arguments)

    monkeypatch.setattr(finetune_module, "quantise_weight", quantise_weight)
    peft = pytest.importorskip("peft")
    model, x = make_plain(), torch.randn(4, 5)
    prepare(model, "qat", lora=peft.LoraConfig(r=4, target_modules=["up", "down"], init_lora_weights=False))
    first = model(x)
    assert torch.equal(model(x), first) and len(made) == 4
    base = model[1].up.base_layer
    with torch.no_grad():
        assert torch.equal(model(x), first) and len(made) == 4
        base.weight.mul_(2)
    assert not torch.equal(model(x), first) and len(made) == 8
    with torch.no_grad():
        # It goes through `data`, so that the weight's version stays.
        model[1].up.merge()
        merged = model(x)
    restore(model)
    prepare(model, "qat")
    assert torch.equal(model(x), merged)


def test_what_cannot_be_prepared_is_said_and_changes_nothing(monkeypatch):
    model = make_plain()
    modules = dict(model.named_modules())
    peft = pytest.importorskip("peft")
    bad_lora = peft.LoraConfig(target_modules=["absent"])
    for error, words, arguments in [
        (ValueError, "nothing to prepare", {}),
        (ValueError, "unknown linears 'int4' to train with: choose from qat, quartet", {"linears": "int4"}),
        (ValueError, "unknown rounding 'up'", {"linears": "quartet", "rounding": "up"}),
        (ValueError, "is for quartet: qat doesn't round", {"linears": "qat", "rounding": "stochastic"}),
        (ValueError, "quartet2 rounds its scales", {"linears": "quartet2", "rounding": "stochastic"}),
        (ValueError, "give linears, too", {"rounding": "stochastic", "lora": bad_lora}),
        (ValueError, "have no backward", {"attention": DMAConfig(linears="fp8")}),
        (ValueError, "leaves calls that train to stock", {"attention": DMAConfig.preset("auto")}),
        (
            ValueError,
            "threshold has no backward",
            {"attention": DMAConfig(policy="skip_softmax(threshold=0.01)")},
        ),
        (TypeError, "lora must be a peft.LoraConfig, got int", {"lora": 8}),
        (ValueError, "absent", {"linears": "qat", "lora": bad_lora}),
    ]:
        with pytest.raises(error, match=words):
            prepare(model, **arguments)
        assert {name: type(m) for name, m in model.named_modules()} == {
            n: type(m) for n, m in modules.items()
        }
    with pytest.raises(TypeError, match=r"give pipe\.transformer"):
        prepare("flux", "qat")
    with pytest.raises(ValueError, match=r"no linear layer to train at low precision: .*no multiple of 32"):
        prepare(torch.nn.Sequential(torch.nn.Linear(32, 48)), "qat")
    with pytest.raises(ValueError, match="the model is this layer itself"):
        prepare(torch.nn.Linear(32, 32), "qat")
    prepare(model, "qat")
    with pytest.raises(ValueError, match="prepared already"):
        prepare(model, "quartet")
    quantised = tiny_models.flux().model
    quantize_linears(quantised, "int8")
    with pytest.raises(ValueError, match="quantised already"):
        prepare(quantised, "qat")
    restore(model)
    real = builtins.__import__

    def without_peft(name, *args, **kwargs):
        if name == "peft":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_peft)
    with pytest.raises(ImportError, match="lora needs peft: pip install peft"):
        prepare(model, "qat", lora=8)
