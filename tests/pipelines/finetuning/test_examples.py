"""A model learns from its pipeline's own calls, or from a folder's pictures and clips."""

import copy
import json
from functools import partial
from shutil import rmtree
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dma_diffusers.pipelines.finetuning import request
from dma_diffusers.pipelines.finetuning.calls import Call, Part, first_call, joined
from dma_diffusers.pipelines.finetuning.data import Example, frames_of, read_folder, store_examples
from dma_diffusers.pipelines.finetuning.guidance import parts_of
from dma_diffusers.pipelines.finetuning.latents import encode
from dma_diffusers.pipelines.finetuning.objectives import Distillation, FlowMatching, velocity_loss
from dma_diffusers.pipelines.finetuning.store import CallStore, HeldCalls
from dma_diffusers.pipelines.finetuning.target import with_size
from dma_diffusers.pipelines.finetuning.teacher import store_teacher
from dma_diffusers.pipelines.load import DEMO_MODEL, VIDEO_DEMO_MODEL, load_pipeline
from tests import tiny_pipelines
from tests.tiny_pipelines import CALLS

CPU, NOTHING = torch.device("cpu"), torch.Generator()


def silent(title: str, done: int, total: int) -> None:
    pass


def call_of(pipe, **more) -> dict:
    return with_size(pipe, {**CALLS[type(pipe)], "num_inference_steps": 2, "negative_prompt": "", **more})


@pytest.mark.parametrize(
    ("family", "more", "weights"),
    [
        ("flux", {}, [1]),
        ("flux", {"true_cfg_scale": 2.0}, [2, -1]),
        ("wan", {"guidance_scale": 3.0, "height": 32, "width": 32}, [3, -2]),
    ],
)
def test_recorded_calls_are_those_that_the_pipeline_makes(family, more, weights, tmp_path):
    """Each sample's velocities are those of the model, whatever it was drawn with and is joined with."""
    pipe = getattr(tiny_pipelines, family)()
    store, prompts, call = CallStore(tmp_path), ["a cat", "a dog", "an owl"], call_of(pipe, **more)
    store_teacher(pipe, pipe.transformer, prompts, call, store, seed=5, batch=2, on_step=silent)
    calls = Distillation(CallStore(tmp_path), len(prompts))
    assert len(calls.levels) == len(prompts) * 2 and len(set(calls.levels)) == 2
    with torch.no_grad():
        mixed = calls.batch([0, 2, 5], CPU, NOTHING)
        assert velocity_loss(pipe.transformer, mixed) < 1e-12 < mixed.output.square().mean()
    for step in store.steps(3):
        np.testing.assert_allclose(step.weights, weights, rtol=1e-4)
    latents = pipe(
        prompt=prompts[2], generator=torch.Generator().manual_seed(7), output_type="latent", **call
    )  # fmt: skip
    first = store.read(2, 0).inputs["hidden_states"]
    assert first.shape == latents[0].shape  # prompt 2 has seed 5 + 2
    second = store.read(2, len(weights))
    assert second.level != store.read(2, 0).level
    with torch.no_grad():
        assert not second.inputs["hidden_states"].allclose(first)
    before = (tmp_path / "000002.safetensors").stat().st_mtime_ns
    (tmp_path / "000000.safetensors").unlink()
    assert store.stored() == {2}
    store_teacher(pipe, pipe.transformer, prompts, call, store, seed=5, batch=2, on_step=silent)
    assert (tmp_path / "000002.safetensors").stat().st_mtime_ns == before and store.stored() == {0, 1, 2}


@pytest.mark.parametrize(
    ("family", "more"),
    [("flux", {"true_cfg_scale": 2.0}), ("wan", {"guidance_scale": 3.0, "height": 32, "width": 32})],
)
def test_a_drawing_ends_after_its_first_steps(family, more, tmp_path):
    """Its stored steps equal the first ones of a whole drawing, and a training can use drawings of both kinds."""
    pipe = getattr(tiny_pipelines, family)()
    prompts, call = ["a cat", "a dog", "an owl"], call_of(pipe, **more, num_inference_steps=3)
    store, whole = CallStore(tmp_path / "both"), CallStore(tmp_path / "whole")
    draw, told = partial(store_teacher, call=call, seed=5, batch=2), []
    resumed = getattr(tiny_pipelines, family)()  # which drew nothing before
    draw(pipe, pipe.transformer, prompts[:1], store=store, on_step=silent)
    steps = {"steps": 2, "on_step": lambda *progress: told.append(progress[1:])}
    draw(resumed, resumed.transformer, prompts, store=store, **steps)
    draw(pipe, pipe.transformer, prompts, store=whole, on_step=silent)
    assert told == [(1, 2), (2, 2)]
    counts = [sum(step.sample == sample for step in store.steps(3)) for sample in range(3)]
    assert counts == [3, 2, 2]
    for step in store.steps(3):
        for number in step.calls:
            ours, theirs = store.read(step.sample, number), whole.read(step.sample, number)
            torch.testing.assert_close(ours.output, theirs.output)
            assert ours.inputs["hidden_states"].shape == theirs.inputs["hidden_states"].shape
    calls = HeldCalls(store, 3, CPU)
    assert calls.steps(3) == store.steps(3) and calls.steps(1) == store.steps(1)
    places = [(2, 3), (0, 0), (0, 5), (1, 2), (2, 0)]
    held, read = calls.batch(places, CPU), store.batch(places, CPU)
    torch.testing.assert_close(dict(held.inputs), dict(read.inputs), rtol=0, atol=0)
    assert held.shared == read.shared and held.output.equal(read.output)


def test_drawings_that_cannot_end_early_are_refused(tmp_path):
    class Endless:
        pass

    with pytest.raises(ValueError, match="Endless can't be stopped after 2 steps"):
        store_teacher(
            Endless(), torch.nn.Identity(), ["a cat"], {}, CallStore(tmp_path), 0, 1, silent, steps=2
        )


def test_calls_of_an_earlier_version_are_refused(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "000000.safetensors", {"calls": "[]"})
    with pytest.raises(ValueError, match="as an earlier version stored them"):
        CallStore(tmp_path).steps(1)


def test_equal_tensors_are_stored_once(tmp_path):
    text, outputs = torch.randn(2, 300), torch.randn(4, 2, 6)
    calls = [
        Call({"hidden_states": x, "timestep": torch.ones(2), "text": text.clone()}, frozenset(), x + 1)
        for x in outputs
    ]
    CallStore(tmp_path).write([3, 7], calls, [Part(i) for i in range(4)])
    file = load_file(tmp_path / "000003.safetensors")
    assert sum(tensor.shape == text.shape for tensor in file.values()) == 1
    assert CallStore(tmp_path).read(7, 2).inputs["text"].equal(text[1:])


def test_a_store_that_was_removed_is_forgotten(tmp_path):
    for value in (1.0, 2.0):
        inputs = {"hidden_states": torch.zeros(1, 4), "timestep": torch.ones(1)}
        store = CallStore(tmp_path / "store")
        store.write([0], [Call(inputs, frozenset(), torch.full((1, 4), value))])
        assert CallStore(store.folder).read(0, 0).output.unique() == value
        rmtree(store.folder)


def test_the_layout_of_stored_calls_has_this_number(tmp_path):
    """Whoever writes something else raises the number, by which folders of before are refused."""
    call = Call({"hidden_states": torch.zeros(2, 4), "timestep": torch.ones(2)}, frozenset())
    CallStore(tmp_path).write([4, 5], [call])
    with safe_open(tmp_path / "000004.safetensors", "pt") as file:
        chunk = json.loads(file.metadata()["chunk"])
    assert request._LAYOUT == 3 and chunk.keys() == {"samples", "calls"}
    parts = {"tensors", "others", "shared", "output", "level", "step", "weight"}
    assert [each.keys() for each in chunk["calls"]] == [parts]


def test_what_counts_is_the_error_of_the_sum(tmp_path):
    """An error in both calls alike counts once; one in a call alone as much as guidance makes of it."""
    outputs = torch.randn(4, 1, 6, generator=torch.Generator().manual_seed(0))
    calls = [
        Call(
            {"hidden_states": torch.zeros(1, 6), "timestep": torch.tensor([1.0 - i // 2])},
            frozenset(),
            output,
        )
        for i, output in enumerate(outputs)
    ]
    store = CallStore(tmp_path)
    store.write([0], calls, [Part(0, 3.0), Part(0, -2.0), Part(1, 3.0), Part(1, -2.0)])
    batch = Distillation(store, 1).batch([0, 1], CPU, NOTHING)
    for errors, expected in [
        ((1, 1, 0, 0), 0.5),
        ((1, 0, 0, 0), 4.5),
        ((0, 0, 0, 1), 2.0),
        ((0, 0, 1, 2), 0.5),
    ]:
        given = outputs[:, 0] + torch.tensor(errors)[:, None]
        assert velocity_loss(lambda given=given, **_: (given,), batch) == pytest.approx(expected, rel=1e-5)


class Scheduler:
    """A scheduler whose steps return their velocity, and are counted."""

    def __init__(self):
        self.steps = 0

    def step(self, velocity, *others):
        self.steps += 1
        return velocity


def test_guidance_that_is_no_sum_leaves_each_call_alone():
    """The second guidance rescales each channel, the third one each sample; no step follows the last call."""
    pipe, calls = SimpleNamespace(scheduler=Scheduler()), []
    generator = torch.Generator().manual_seed(1)
    with parts_of(pipe, calls) as parts:
        for scale in (
            torch.tensor(1.0),
            torch.rand(2**16, generator=generator) + 0.5,
            torch.tensor([[1.0], [0.7]]),
        ):
            own = torch.randn(2, 2, 2**16, generator=generator)
            calls += [Call({}, frozenset(), output) for output in own]
            pipe.scheduler.step((4 * own[0] - 3 * own[1]) * scale)
        calls.append(calls[0])
    assert [part.step for part in parts] == [0, 0, 2, 3, 4, 5, 6]
    np.testing.assert_allclose([part.weight for part in parts], [4, -3, 1, 1, 1, 1, 1], rtol=1e-5)
    assert "step" not in vars(pipe.scheduler)


def test_a_copy_of_the_scheduler_makes_its_own_steps():
    """LTX-2 steps its sound with a copy, SkyReels-V2 each frame."""
    pipe, velocity = SimpleNamespace(scheduler=Scheduler()), torch.ones(1, 4)
    with parts_of(pipe, [Call({}, frozenset(), velocity)]) as parts:
        sound = copy.deepcopy(pipe.scheduler)
        sound.step(velocity)
        assert (sound.steps, pipe.scheduler.steps, parts) == (1, 0, [])
        pipe.scheduler.step(2 * velocity)
    assert (sound.steps, pipe.scheduler.steps) == (1, 1) and parts[0].weight == pytest.approx(2)


def test_flow_matching_mixes_noise_at_the_schedule_s_levels(tmp_path):
    pipe = tiny_pipelines.flux()
    call = call_of(pipe, num_inference_steps=8)
    Image.new("RGB", (60, 50), "red").save(tmp_path / "x.png")
    store = CallStore(tmp_path / "store")
    sigmas = store_examples(pipe, pipe.transformer, [Example(tmp_path / "x.png", "x")], call, store, silent)
    assert len(sigmas) == 9 and sigmas[-1] == 0
    pipe.scheduler.set_timesteps(3, mu=1.0)
    again = store_examples(pipe, pipe.transformer, [Example(tmp_path / "none.png", "x")], call, store, silent)
    assert again == sigmas
    clean = store.read(0, 0).inputs["hidden_states"]
    objective = FlowMatching(store, 1, sigmas)
    mixed = objective.batch([0] * 64, CPU, torch.Generator().manual_seed(0))
    sigma = mixed.inputs["timestep"][:, None, None]  # FLUX's transformer takes σ itself
    noise = mixed.output + clean
    torch.testing.assert_close(mixed.inputs["hidden_states"], (1 - sigma) * clean + sigma * noise)
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    below = (sigma.flatten() < sigmas[4]).float().mean()
    assert 0.3 < below < 0.7  # half of the steps are below the middle one's level
    one = FlowMatching(store, 1, sigmas, by_level=True).batch([0] * 8, CPU, torch.Generator())
    assert len(one.inputs["timestep"].unique()) == 1 < len(mixed.inputs["timestep"].unique())


def test_wan_s_noise_level_is_in_thousandths(tmp_path):
    pipe = tiny_pipelines.wan()
    call = call_of(pipe, height=32, width=32, num_frames=5)
    asked = first_call(pipe, pipe.transformer, "x", call)
    store = CallStore(tmp_path)
    frames = [Image.new("RGB", (32, 32), (i * 40, 0, 0)) for i in range(5)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    sigmas = store_examples(pipe, pipe.transformer, [Example(tmp_path / "x.gif", "x")], call, store, silent)
    stored = store.read(0, 0)
    assert stored.inputs["hidden_states"].shape == asked.inputs["hidden_states"].shape == (1, 16, 2, 4, 4)
    assert stored.level == pytest.approx(1000, rel=1e-3)
    batch = FlowMatching(store, 1, sigmas).batch([0, 0], CPU, torch.Generator())
    with torch.no_grad():
        assert velocity_loss(pipe.transformer, batch).isfinite()


@pytest.mark.parametrize(("model", "frames"), [(DEMO_MODEL, 1), (VIDEO_DEMO_MODEL, 5)])
def test_the_pipeline_decodes_what_was_encoded(model, frames):
    """It decodes latents as if its transformer had drawn them: to what the autoencoder alone makes of a picture."""
    pipe = load_pipeline(model)
    pictures = torch.randint(256, (frames, 64, 64, 3), generator=torch.Generator().manual_seed(0)).to(
        torch.uint8
    )
    latents = encode(pipe, pictures)
    pipe.scheduler.step = lambda velocity, t, x, **_: (latents,)
    size = {"num_frames": frames} if frames > 1 else {}
    drawn = pipe(
        prompt="a cat", height=64, width=64, num_inference_steps=1, output_type="np", max_sequence_length=16, **size
    )  # fmt: skip
    drawn = drawn.frames[0] if frames > 1 else drawn.images
    pixels = pictures.permute(3, 0, 1, 2)[None] / 127.5 - 1
    pixels = pixels if frames > 1 else pixels[:, :, 0]
    with torch.no_grad():
        there_and_back = pipe.vae.decode(pipe.vae.encode(pixels).latent_dist.mode()).sample
    expected = (there_and_back / 2 + 0.5).clamp(0, 1)
    expected = expected[0].permute(1, 2, 3, 0) if frames > 1 else expected.permute(0, 2, 3, 1)
    np.testing.assert_allclose(drawn, expected.numpy(), atol=1e-4)


def test_captions_are_beside_pictures_or_in_a_table(tmp_path):
    for name in ("b.png", "a.jpg", "note.md"):
        Image.new("RGB", (8, 8)).save(tmp_path / name, "PNG")
    (tmp_path / "a.txt").write_text("an apple\n")
    with pytest.raises(ValueError, match=r"1 pictures have no caption, the first is b.png"):
        read_folder(tmp_path, video=False)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "b.png", "text": "a bee"}))
    assert [example.caption for example in read_folder(tmp_path, video=False)] == ["an apple", "a bee"]
    with pytest.raises(ValueError, match="holds no clips"):
        read_folder(tmp_path, video=True)


def test_short_clips_are_named(tmp_path):
    Image.new("RGB", (8, 8)).save(
        tmp_path / "x.gif", save_all=True, append_images=[Image.new("RGB", (8, 8), "red")]
    )
    with pytest.raises(ValueError, match=r"x.gif has 2 frames, and 5 are wanted"):
        frames_of(tmp_path / "x.gif", (8, 8), 5)
    assert frames_of(tmp_path / "x.gif", (6, 4), 2).shape == (2, 4, 6, 3)


def test_calls_join_only_their_samples(tmp_path):
    """FLUX's positions hold for all samples, even where a batch is as long as its text."""
    pipe = tiny_pipelines.flux()
    alone = first_call(pipe, pipe.transformer, "a cat", call_of(pipe))
    count = len(alone.inputs["txt_ids"])
    call = first_call(pipe, pipe.transformer, ["a cat"] * count, call_of(pipe))
    assert call.shared == {"img_ids", "txt_ids"}
    CallStore(tmp_path).write(range(count), [call])
    one = CallStore(tmp_path).read(3, 0)
    assert len(one.inputs["hidden_states"]) == 1 and len(one.inputs["txt_ids"]) == count
    both = joined([one, one], CPU)
    assert len(both.inputs["hidden_states"]) == 2 and len(both.inputs["txt_ids"]) == count
