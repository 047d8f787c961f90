"""Schedules in models: each step runs what holds at its noise level, eager and compiled, and receipts say so."""

import json

import pytest
import torch
from diffusers import FirstBlockCacheConfig, UniPCMultistepScheduler

from dma_diffusers import DMAConfig, apply, report, warmup
from dma_diffusers.forward import UNKNOWN_NOISE
from dma_diffusers.kernels import operator
from tests import tiny_pipelines
from tests.dma_diffusers import tiny_models
from tests.dma_diffusers.graphs import Graphs
from tests.tiny_pipelines import draw

DENSE, HALF, REST = "dense(everywhere=high)", "importance(budget=0.5) low=nvfp4", "dense(everywhere=low)"
SCHEDULE = f"sigma>0.9: {DENSE}; sigma>0.4: {HALF}; {REST}"
STEPS = 4
NAMES = ("flux", "sd3", "wan")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


@pytest.fixture
def asked(monkeypatch):
    """The operator's keyword arguments in all calls."""
    found, genuine = [], operator.attention

    def attention(*tensors, **arguments):
        found.append(arguments)
        return genuine(*tensors, **arguments)

    monkeypatch.setattr(operator, "attention", attention)
    return found


def levels(pipe) -> list[float]:
    return pipe.scheduler.sigmas[:STEPS].tolist()


def by_hand(pipe, **common) -> torch.Tensor:
    """The drawing with the configuration of each entry applied before each step whose noise level it holds at."""

    def put_on(level: float) -> None:
        fields = {"policy": REST} if level <= 0.4 else {"policy": DENSE}
        if 0.4 < level <= 0.9:
            fields = {"policy": "importance(budget=0.5)", "low": "nvfp4"}
        apply(pipe, **common | fields)

    def after(pipe, step: int, timestep, tensors: dict) -> dict:
        if step + 1 < STEPS:
            put_on(levels(pipe)[step + 1])
        return tensors

    put_on(1.0)
    return draw(pipe, num_inference_steps=STEPS, callback_on_step_end=after)


@pytest.mark.parametrize("name", NAMES)
def test_each_step_runs_the_entry_of_its_noise_level(name):
    pipe = getattr(tiny_pipelines, name)()
    expected = by_hand(pipe, min_length=0)
    apply(pipe, min_length=0, schedule=SCHEDULE)
    assert torch.equal(draw(pipe, num_inference_steps=STEPS), expected)
    high, low = (sum(level > above for level in levels(pipe)) for above in (0.9, 0.4))
    assert 0 < high < low < STEPS
    modules = [module for module in report(pipe).modules if module.policy]
    calls = 2 if name == "wan" else 1  # in a step
    counts = dict(
        zip(SCHEDULE.split("; "), (high * calls, (low - high) * calls, (STEPS - low) * calls), strict=True)
    )
    assert [module.by_entry for module in modules] == [counts] * len(modules)
    assert {module.policy for module in modules} == {SCHEDULE}
    of_all = "; ".join(f"{count * len(modules)} of {entry}" for entry, count in counts.items())
    assert f"  {STEPS * calls * len(modules)} calls intercepted: {of_all}" in str(report(pipe))


ROTATED, PLAIN = (
    "importance(budget=0.5) rotation=hadamard16",
    "importance(budget=0.5) smooth_k=false protect_text=false",
)


def test_entries_have_rotations_and_unprotected_text_of_their_own_also_compiled(asked):
    pipe = tiny_pipelines.flux()
    apply(pipe, min_length=0, schedule=f"sigma>0.9: {ROTATED}; sigma>0.4: {PLAIN}; {REST}")
    eager = draw(pipe, num_inference_steps=STEPS)
    of_entries = ("hadamard16", True, True), ("none", False, False), ("none", True, True)
    modules = len(report(pipe).modules)
    steps = [of_entries[(level <= 0.9) + (level <= 0.4)] for level in levels(pipe) for _ in range(modules)]
    found = [(call["rotation"], call["smooth_k"], call["text_stop"] > call["text_start"]) for call in asked]
    assert found == steps and len(set(steps)) == 3
    assert all(list(module.by_entry)[1] == f"sigma>0.4: {PLAIN}" for module in report(pipe).modules)
    pipe.transformer.compile(backend="eager", fullgraph=True)
    assert torch.equal(draw(pipe, num_inference_steps=STEPS), eager)


def graphs_of(pipe, lengths=(19,), steps=STEPS, method="compile_repeated_blocks", expected=None) -> list[int]:
    """The numbers of graphs with attention after a drawing with each length of text."""
    torch.compiler.reset()
    graphs, counts = Graphs(), []
    getattr(pipe.transformer, method)(backend=graphs, fullgraph=True)
    for number, length in enumerate(lengths):
        latents = draw(pipe, num_inference_steps=steps, max_sequence_length=length)
        assert expected is None or torch.equal(latents, expected[number])
        counts.append(len([nodes for nodes in graphs.nodes if nodes or expected is None]))
    return counts


@pytest.mark.parametrize("method", ["compile", "compile_repeated_blocks"])
@pytest.mark.parametrize("name", ["flux", "wan"])
def test_a_compiled_model_has_few_graphs_whatever_the_number_of_steps(name, method):
    """One for a first entry, one for others in the same formats, one for those in other formats."""
    build = getattr(tiny_pipelines, name)
    pipe, kinds = build(), {"compile": 1, "compile_repeated_blocks": {"flux": 2, "wan": 1}[name]}[method]
    apply(pipe, min_length=0, schedule=SCHEDULE)
    eager = [draw(pipe, num_inference_steps=steps, max_sequence_length=19) for steps in (STEPS, 7)]
    (stock,), graphs = graphs_of(build(), method=method), Graphs()
    torch.compiler.reset()
    getattr(pipe.transformer, method)(backend=graphs, fullgraph=True)
    for steps, expected in zip((STEPS, 7), eager, strict=True):
        assert torch.equal(draw(pipe, num_inference_steps=steps, max_sequence_length=19), expected)
        attending = [nodes for nodes in graphs.nodes if nodes]  # the hook may have a little graph of its own
        assert len(attending) == stock + 2 * kinds


OF_POLICIES = "; ".join([*(f"sigma>{level}: importance(budget={level})" for level in (0.95, 0.8, 0.5)), REST])
OWN = {
    "single_transformer_blocks.1.attn": {"schedule": f"sigma>0.8: importance(budget=0.3); {REST}"},
    "single_transformer_blocks.2.attn": {"policy": "importance(budget=0.2)"},
    "single_transformer_blocks.3.attn": {"dense": True},
    "single_transformer_blocks.4.attn": {"policy": "skip_softmax(threshold=0.01)"},
}


@pytest.mark.parametrize("own", [{}, OWN], ids=["alike", "modules of their own"])
def test_four_policies_are_two_graphs_and_new_lengths_no_more_than_stocks(own):
    def build():
        return tiny_pipelines.flux(num_layers=1, num_single_layers=6)

    lengths, pipe = (19, 31, 25), build()
    stock = graphs_of(build(), lengths, 6)
    apply(pipe, min_length=0, schedule=OF_POLICIES, modules=own, dense_layers=(), dense_above_sigma=1)
    eager = [draw(pipe, num_inference_steps=6, max_sequence_length=length) for length in lengths]
    assert {len(module.by_entry) for module in report(pipe).modules} >= {4}
    assert graphs_of(pipe, lengths, 6, expected=eager) == [
        count + 2 for count in stock
    ]  # of two kinds of blocks


def test_the_highest_noise_level_of_a_batch_counts(asked):
    case = tiny_models.make("wan")
    apply(case.model, min_length=0, schedule=SCHEDULE)
    for timesteps, expected in (
        ([950.0, 100.0], DENSE),
        ([100.0, 500.0], "importance(budget=0.5)"),
        ([1.0, 2.0], REST),
    ):
        asked.clear()
        hidden, prompt = (torch.cat([x[:1], x[:1]]) for x in (case.pack(case.latents), case.texts(1)[0]))
        inputs = case.inputs | {"timestep": torch.tensor(timesteps)}
        with torch.no_grad():
            case.model(hidden_states=hidden, encoder_hidden_states=prompt, **inputs)
        assert {call["policy"] for call in asked} == {expected}


def test_of_two_experts_each_has_the_entries_of_its_steps():
    """As in Wan 2.2, at its own shift: steps at .999, .9, .75 and .5, two calls each."""
    pipe = tiny_pipelines.wan()
    pipe.transformer_2 = tiny_pipelines.wan().transformer
    pipe.register_to_config(boundary_ratio=0.875)
    pipe.scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    apply(pipe, min_length=0, schedule=SCHEDULE.replace("0.4", "0.6"))
    draw(pipe, num_inference_steps=STEPS)
    found = {
        module.module: list(module.by_entry.values()) for module in report(pipe).modules if module.policy
    }
    assert found == {
        f"{model}.blocks.{number}.attn1": counts
        for model, counts in (("transformer", [2, 2, 0]), ("transformer_2", [0, 2, 2]))
        for number in range(2)
    }


def test_a_cache_that_leaves_blocks_out_changes_no_entry():
    pipe = tiny_pipelines.flux()
    apply(pipe, min_length=0, schedule=SCHEDULE)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=10))  # others run in the first step alone
    draw(pipe, num_inference_steps=STEPS)
    first, *others = (list(module.by_entry.values()) for module in report(pipe).modules)
    high, low = (sum(level > above for level in levels(pipe)) for above in (0.9, 0.4))
    assert first == [high, low - high, STEPS - low] and others == [[1, 0, 0]] * 2


def test_schedules_of_a_policy_file(tmp_path):
    names = [
        "transformer_blocks.0.attn",
        *(f"single_transformer_blocks.{number}.attn" for number in range(2)),
    ]
    own = f"sigma>0.4: diagonal(window=0/384, sink=0); {REST}"
    choice = {
        "quality": 0.5, "config": {"high": "mxfp8", "low": "mxfp4", "schedule": SCHEDULE, "min_length": 0},
        "modules": {names[0]: {"schedule": own}, names[1]: {"dense": True}, names[2]: {"high": "mxfp8/fp8"}},
    }  # fmt: skip
    path = tmp_path / "policy.json"
    model = {"class": "FluxTransformer2DModel", "modules": names, "fingerprint": ""}
    path.write_text(json.dumps(
        {"format": "dma-diffusers policy", "version": 1, "quality": 0.5, "model": model, "choices": [choice]}
    ))  # fmt: skip
    pipe = tiny_pipelines.flux()
    apply(pipe, DMAConfig.from_file(path))
    draw(pipe, num_inference_steps=STEPS)
    found = {module.module.removeprefix("transformer."): module for module in report(pipe).modules}
    assert [found[name].policy for name in names] == [own, DENSE, SCHEDULE]
    assert found[names[0]].by_entry.keys() == set(own.split("; ")) and found[names[1]].by_entry == {}
    assert sum(found[names[0]].by_entry.values()) == STEPS
    assert (
        DMAConfig.from_file(path, schedule="sigma>0.9: dense(); low=fp8", policy=REST).entries[1].config.low
        == "fp8"
    )


def test_every_entry_is_warmed_up():
    pipe = tiny_pipelines.flux()
    apply(pipe, min_length=0, schedule=SCHEDULE)
    made = [dict(call.call.options) for call in warmup(pipe, ["40x48"], text=19, progress=False)]
    assert [(options["policy"], options["low"]) for options in made] == [
        (DENSE, "mxfp4"), ("importance(budget=0.5)", "nvfp4"), (REST, "mxfp4"),
    ]  # fmt: skip
    apply(pipe, min_length=0, schedule=f"sigma>0.9: {DENSE}; neighborhood(window=9x8)")
    with pytest.raises(ValueError, match=r"neighborhood\(window=9x8\) needs a grid: give sizes in pixels"):
        warmup(pipe, [480], text=19, progress=False)
    grids = {dict(call.call.options)["grid"] for call in warmup(pipe, ["40x48"], text=19, progress=False)}
    assert len(grids) == 1 and () not in grids  # dense steps share what is kept for calls of the size


def test_what_cannot_be_had_is_said_before_the_first_step(tmp_path):
    with pytest.raises(
        ValueError, match="schedule: the scale of CosmosTransformer3DModel's timestep is not known"
    ):
        apply(tiny_pipelines.cosmos(), schedule=SCHEDULE)
    apply(tiny_pipelines.cosmos(), schedule=REST)  # one entry asks for no noise level
    with pytest.raises(ValueError, match="has 2 heads, and this configuration windows for 3"):
        apply(tiny_pipelines.flux(), schedule=f"sigma>0.9: {DENSE}; window=0/0/0")
    case = tiny_models.make("prx")
    apply(case.model, min_length=0, schedule=f"sigma>0.001: {DENSE}; neighborhood(window=5x5)")
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=r"neighborhood\(window=5x5\) needs the text among the"),
    ):
        case.run(case.texts(1)[0])


def test_steps_fall_back_by_the_entry_that_holds_in_them(monkeypatch):
    """With lowering "fastest", as on a GPU that gains by int8 alone: steps in other formats are stock, and return."""
    monkeypatch.setattr(
        "dma_diffusers.config.why_not_faster",
        lambda device, dim, high, low, masked: "" if low == "int8" else "slower",
    )
    monkeypatch.setattr("dma_diffusers.config.gains_from", lambda device, head_dim, all_low: 0)
    pipe = tiny_pipelines.flux()
    apply(
        pipe,
        min_length=0,
        lowering="fastest",
        low="int8",
        schedule=f"sigma>0.9: low=fp8; sigma>0.4: {REST}; low=fp8",
    )
    draw(pipe, num_inference_steps=STEPS)
    draw(pipe, num_inference_steps=STEPS)
    high, low = (sum(level > above for level in levels(pipe)) for above in (0.9, 0.4))
    for module in report(pipe).modules:
        assert list(module.by_entry.values()) == [0, 2 * (low - high), 0]
        assert module.fallbacks == {"slower": 2 * (STEPS - low + high)}
        assert module.lowering == "stock or reference" and module.reason.startswith("slower; ")


def test_a_call_without_a_noise_level_runs_the_first_entry_and_the_receipt_notes_it(asked):
    pipe = tiny_pipelines.flux()
    apply(pipe, min_length=0, schedule=SCHEDULE)
    forward = pipe.transformer._dma_attachment.forward
    forward.begin_on_device(pipe.transformer, (), {"encoder_hidden_states": torch.empty(1, 3, 8)})
    assert forward.call.stage == 0
    forward.end(pipe.transformer, (), None)
    forward.begin_on_device(pipe.transformer, (), {"timestep": torch.tensor([0.1])})
    assert forward.call.stage == 2
    assert all(UNKNOWN_NOISE in module.notes for module in report(pipe).modules)
