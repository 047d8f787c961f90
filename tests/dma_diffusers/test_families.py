"""The place of the text, told by the models themselves: the keys that change when the text does are the text."""

from collections import Counter

import diffusers
import pytest
import torch
from diffusers.models import controlnets, transformers

from dma_diffusers import DMAConfig, apply
from dma_diffusers.families import CONTROLNETS, FAMILIES, TRANSFORMERS, family_of, page
from dma_diffusers.kernels import operator
from tests.dma_diffusers import tiny_models


@torch.no_grad()
@pytest.mark.parametrize("name", tiny_models.EVERY)
def test_text_range_is_where_the_keys_follow_the_text(name, monkeypatch):
    case = tiny_models.make(name)
    first, second = case.texts(2)
    changed = (case.keys(first) != case.keys(second)).any(-1).any(1).any(0).nonzero().flatten().tolist()
    assert changed == list(range(*case.prompt or case.text))

    calls = Counter()
    genuine = operator.attention

    def spy(query, key, value, **kwargs):
        calls[query.shape[2], key.shape[2], kwargs["text_start"], kwargs["text_stop"]] += 1
        return genuine(query, key, value, **kwargs)

    monkeypatch.setattr(operator, "attention", spy)
    apply(case.model, min_length=0)
    case.run(first)
    assert calls == case.calls


def exported(package) -> set[str]:
    """The models that a package of Diffusers exports."""
    kinds = [kind for kind in vars(package).values() if isinstance(kind, type)]
    return {kind.__name__ for kind in kinds if issubclass(kind, diffusers.ModelMixin)}


def test_every_class_that_diffusers_exports_has_its_row():
    assert exported(transformers) == set(TRANSFORMERS)
    assert exported(controlnets) == set(CONTROLNETS)


def test_every_family_that_can_be_had_is_told_by_a_model():
    told = {type(tiny_models.make(name).model).__name__ for name in tiny_models.EVERY}
    assert told == {kind for kind, family in FAMILIES.items() if not family.refusal}
    assert len(told & set(TRANSFORMERS)) >= 66


@pytest.mark.parametrize("kind", [kind for kind, family in FAMILIES.items() if family.refusal])
def test_what_cannot_be_had_is_refused_with_the_reason(kind):
    cls = getattr(diffusers, kind, None) or getattr(transformers, kind, None) or getattr(controlnets, kind)
    for text in (None, "none", "first"):
        with pytest.raises(ValueError, match=f"^{kind} can't be had: .*it") as error:
            apply(cls.__new__(cls), text=text)
        assert "\n" not in str(error.value)


def test_the_page_is_up_to_date():
    text = page.PAGE.read_text()
    assert page.with_tables(text) == text, "run: python -m dma_diffusers.families.page"
    for kind in FAMILIES:
        assert text.count(f"| `{kind}` |") == 1


class Unknown(torch.nn.Module):
    pass


def test_a_model_of_no_known_family_needs_its_text():
    with pytest.raises(ValueError, match=r"Unknown is of no known family .*text="):
        family_of(Unknown())
    assert family_of(Unknown(), "last").text == "last"


def test_a_subclass_belongs_to_the_family_of_its_base():
    class Mine(diffusers.WanTransformer3DModel):
        pass

    assert family_of(Mine.__new__(Mine)) == FAMILIES["WanTransformer3DModel"]


@pytest.mark.parametrize(
    "kind, place",
    [
        ("FluxTransformer2DModel", "first"),
        ("SD3Transformer2DModel", "last"),
        ("WanTransformer3DModel", "none"),
    ],
)
def test_text_that_contradicts_what_is_known_is_refused(kind, place):
    model = getattr(diffusers, kind).__new__(getattr(diffusers, kind))
    assert family_of(model, place) == FAMILIES[kind]
    for wrong in {"first", "last", "none"} - {place}:
        with pytest.raises(ValueError, match=f'text="{wrong}": {kind} has its text "{place}"'):
            family_of(model, wrong)


def test_single_stream_text_comes_from_the_model_and_must_fit():
    family = FAMILIES["FluxTransformer2DModel"]
    assert family.text_range(queries=300, keys=300, hidden=300, encoder=0, model=20) == (0, 20)
    assert family.text_range(queries=300, keys=300, hidden=300, encoder=0, model=None) is None
    assert family.text_range(queries=300, keys=300, hidden=300, encoder=0, model=301) is None


def test_queries_of_the_image_alone_attend_to_text_and_image():
    for kind, text in (("PRXTransformer2DModel", (0, 20)), ("NucleusMoEImageTransformer2DModel", (280, 300))):
        family = FAMILIES[kind]
        assert family.text_range(queries=280, keys=300, hidden=280, encoder=20, model=20) == text
        for keys in (20, 280 + 19):  # cross-attention, and other tokens than the text
            assert family.text_range(queries=280, keys=keys, hidden=280, encoder=20, model=20) is None
        assert family.text_range(queries=280, keys=300, hidden=280, encoder=20, model=None) is None
    wan = FAMILIES["WanTransformer3DModel"]
    assert wan.text_range(queries=280, keys=300, hidden=280, encoder=0, model=20) is None


def test_modules_that_see_the_image_alone_have_no_text():
    family = FAMILIES["Flux3Transformer2DModel"]
    image, both = (
        family.of_module(name) for name in ("mode_blocks.image.0.attn", "single_transformer_blocks.0.attn")
    )
    assert both is family
    assert image.text_range(queries=300, keys=300, hidden=300, encoder=0, model=20) == (0, 0)
    assert family.stock_role("txt_mode_blocks.0.attn") == "attention among tokens of text"
    assert not family.stock_role("mode_blocks.image.0.attn")


def test_a_published_neighborhood_is_a_share_of_the_grid():
    flux = diffusers.FluxTransformer2DModel.__new__(diffusers.FluxTransformer2DModel)
    video = diffusers.HunyuanVideoTransformer3DModel.__new__(diffusers.HunyuanVideoTransformer3DModel)
    published = DMAConfig.published(flux, (256, 256))
    assert published == DMAConfig(policy="neighborhood(window=80x80, stride=16x16)")
    words = {
        (flux, (64, 96)): "neighborhood(window=20x30, stride=16x16)",
        (video, (30, 48, 80)): "neighborhood(window=18x24x24, stride=16x8x8)",
        (video, (9, 30, 4)): "neighborhood(window=5x15x1, stride=5x8x1)",
    }
    for (model, grid), expected in words.items():
        assert DMAConfig.published(model, grid, low="nvfp4").words == expected
        with_means = DMAConfig.published(model, grid, beyond="mean", low="nvfp4")
        assert with_means.words == expected.replace(")", ", beyond=mean)") and with_means.low == "nvfp4"
    for beyond in ("high", "nothing"):
        with pytest.raises(ValueError, match=f"beyond must be mean or skip, got '{beyond}'"):
            DMAConfig.published(flux, (256, 256), beyond=beyond)
    with pytest.raises(ValueError, match="the published window 80×80 is 2-D, but grid 30×48×80 is 3-D"):
        DMAConfig.published(flux, (30, 48, 80))
    with pytest.raises(
        ValueError, match=r"no neighbourhood was published for Unknown; there are Flux.*, Hunyuan"
    ):
        DMAConfig.published(Unknown(), (64, 64))
