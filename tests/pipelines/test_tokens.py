"""Test that what a pipeline drops is said or refused: ends of prompts, negative prompts, pixels of a size."""

from types import SimpleNamespace

import pytest

from dma_diffusers.pipelines.generate import draw
from dma_diffusers.pipelines.tokens import TokenWatch
from tests.tiny_pipelines import CALLS, cogvideox, flux, hunyuan, sd3, tokenizer, wan, z_image

LONG = "a red apple left of a cat on a yellow background " * 2  # each byte is a token


def drawing_of(pipe, *prompts, **changes):
    call = CALLS[type(pipe)] | {"num_inference_steps": 1} | changes
    return draw(pipe, prompts, range(len(prompts)), call)


@pytest.mark.parametrize(("make", "reads"), [
    (flux, {"tokenizer": (77, 100), "tokenizer_2": (19, 100)}),
    (sd3, {"tokenizer": (77, 100), "tokenizer_2": (77, 100), "tokenizer_3": (23, 100)}),
    (wan, {"tokenizer": (21, 99)}),
    (hunyuan, {"tokenizer": (27, 100), "tokenizer_2": (77, 100)}),
    (cogvideox, {"tokenizer": (16, 100)}),
    (z_image, {"tokenizer": (64, 100)}),
])  # fmt: skip
def test_each_tokenizer_says_what_it_cut(make, reads):
    """Wan's pipeline strips a prompt, and no library says a word of what it cuts."""
    drawing = drawing_of(make(), "a cat", LONG)
    said = {
        f"the prompt was truncated: {name} read the first {k} of {n} tokens" for name, (k, n) in reads.items()
    }
    assert set(drawing.notes) == set(drawing.truncated[1]) == said and not drawing.truncated[0]


def test_a_negative_prompt_is_cut_too():
    drawing = drawing_of(wan(), "a cat", "a dog", negative_prompt=LONG, guidance_scale=5.0)
    assert drawing.notes == ["the negative prompt was truncated: tokenizer read the first 21 of 99 tokens"]


class Pipe:
    """A pipeline that has components, and a limit of the tokens that it keeps."""

    def __init__(self, **components):
        self.components = components

    def __call__(self, prompt, max_sequence_length=12):
        pass


def test_what_a_pipeline_keeps_of_what_its_only_tokenizer_read():
    """Qwen-Image reads 1,024 tokens, and keeps `max_sequence_length` of them."""
    reads_all = tokenizer(1024)
    for limit, cuts in ({}, 12), ({"max_sequence_length": 15}, 15), ({"max_sequence_length": 24}, None):
        watch = TokenWatch(Pipe(tokenizer=reads_all), ["a cat and two dogs"], limit)
        with watch.watching():
            reads_all(["<s> a cat and two dogs"], max_length=1000, truncation=True)
        said = [f"the prompt was truncated: tokenizer read the first {cuts} of 18 tokens"] if cuts else []
        assert watch.cuts == [said]


def test_tokenizers_inside_of_processors_are_seen_and_left_as_they_were():
    inner = tokenizer(8)
    kind = type(inner)
    watch = TokenWatch(Pipe(processor=SimpleNamespace(tokenizer=inner), vae=None), ["a cat and a dog"], {})
    with pytest.raises(KeyError), watch.watching():
        assert isinstance(inner, kind) and inner("a cat and a dog", truncation=True).input_ids[-1] == 2
        raise KeyError
    assert type(inner) is kind and len(watch.cuts[0]) == 1


@pytest.mark.parametrize(("make", "scale", "value"), [
    (flux, "true_cfg_scale", 1.0), (hunyuan, "true_cfg_scale", 1.0), (wan, "guidance_scale", 1.0),
    (sd3, "guidance_scale", 0.5), (cogvideox, "guidance_scale", 1),
])  # fmt: skip
def test_a_negative_prompt_that_is_not_read_is_refused(make, scale, value):
    pipe = make()
    words = (
        f"{type(pipe).__name__} does not read negative_prompt where {scale} is {value}: raise that above 1"
    )
    with pytest.raises(ValueError, match=words):
        drawing_of(pipe, "a cat", negative_prompt="ugly", **{scale: value})
    assert not drawing_of(pipe, "a cat", negative_prompt="ugly", **{scale: 3.0}).notes
    assert not drawing_of(pipe, "a cat", "a dog", negative_prompt="", **{scale: value}).notes


def test_another_size_than_asked_for_is_refused():
    with pytest.raises(ValueError, match="FluxPipeline drew 48x40: ask for that size, not for 48x41"):
        drawing_of(flux(), "a cat", height=41, width=48)
