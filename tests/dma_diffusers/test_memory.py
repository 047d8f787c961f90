"""Memory: pairs of tiles serve the next steps of their own drawing, text and thread, and no other calls."""

import copy
import math
import threading
from types import SimpleNamespace

import pytest
import torch

from dma_diffusers import apply, report
from dma_diffusers.families import Family
from dma_diffusers.kernels import operator
from dma_diffusers.kernels.operator import DENSE, Asked, Result
from dma_diffusers.memory import (
    EVERY,
    MOST_BRANCHES,
    MOST_CALLS,
    MOST_TEXTS,
    UNTOLD,
    Branch,
    Drawings,
    ModuleMemory,
)
from tests import tiny_pipelines
from tests.dma_diffusers.graphs import Graphs

GENUINE = operator._attention
POLICY = "importance(budget=0.3, beyond=mean)"
BY_ROWS = "importance(budget=0.3, beyond=mean, by=rows)"
FIELDS = {
    "min_length": 0,
    "high": "bf16",
    "low": "bf16",
    "policy": POLICY,
    "dense_layers": (),
    "dense_above_sigma": 1,
}


@pytest.fixture(scope="module")
def model():
    return tiny_pipelines.flux().transformer


@pytest.fixture
def calls(monkeypatch):
    """The operator's calls: their memory, whether it was read, and its bits afterwards."""
    found = []

    def attention(**asked):
        result, memory = GENUINE(**asked), asked.get("memory")
        bits = None if memory is None else torch.stack(memory.tensors)
        found.append((memory, memory is not None and memory.is_read, bits))
        return result

    monkeypatch.setattr(operator, "_attention", attention)
    return found


def latents(seed=0, tokens=500) -> torch.Tensor:
    return torch.randn(1, tokens, 16, generator=torch.Generator().manual_seed(seed))


def text(seed=0) -> torch.Tensor:
    return torch.randn(1, 20, tiny_pipelines.WIDTH, generator=torch.Generator().manual_seed(seed))


def run(model, words, level, of=None) -> torch.Tensor:
    of = latents() if of is None else of
    pooled, place = torch.ones(1, tiny_pipelines.WIDTH, dtype=of.dtype), torch.arange(of.shape[1])[:, None]
    level, places, none = torch.tensor([float(level)]), place.expand(-1, 3), torch.zeros(words.shape[1], 3)
    others = (x.to(of.device) for x in (pooled, level, places, none))
    return model(of, words, *others, return_dict=False)[0]


def reads(calls) -> str:
    """The calls of the first of three modules: r where memory was read, c where pairs were chosen, - without memory."""
    return "".join("-" if memory is None else "r" if is_read else "c" for memory, is_read, _ in calls[::3])


@torch.no_grad()
def test_pairs_serve_a_few_steps_at_noise_levels_not_far_below(model, calls):
    apply(model, **FIELDS)
    words = text()
    levels = [1, 0.9, 0.75, 0.7, *(0.69 - 0.01 * step for step in range(EVERY))]
    outs = [run(model, words, level, latents(seed)) for seed, level in enumerate(levels)]
    assert reads(calls) == "crrc" + "r" * (EVERY - 1) + "c"
    for module in range(3):
        own = calls[module::3]
        for step in (1, 2, 4, 8):
            assert own[step][0] is own[0][0] and torch.equal(own[step][2], own[step - 1][2])
        assert not torch.equal(own[3][2], own[2][2])  # other latents show other pairs
    note = f"importance was found in 3 calls, and remembered in {EVERY + 1}"
    assert all(note in module.notes for module in report(model).modules if module.intercepted)
    apply(model, **FIELDS | {"policy": BY_ROWS})
    fresh = [run(model, words, level, latents(seed)) for seed, level in enumerate(levels)]
    is_same = "".join("c" if torch.equal(*pair) else "r" for pair in zip(outs, fresh, strict=True))
    assert is_same == "crrc" + "r" * (EVERY - 1) + "c"


@torch.no_grad()
def test_another_drawing_size_or_policy_forgets(model, calls):
    apply(model, **FIELDS)
    words = text()
    for level in (1, 0.9, 1, 0.9):  # the level rises
        run(model, words, level)
    run(model, words, 0.9)  # with other latents
    run(model, words, 0.8, latents(tokens=600))
    run(model, words, 0.75, latents(tokens=600))
    assert reads(calls) == "crcrccr"
    calls.clear()
    apply(model, **FIELDS | {"policy": None, "schedule": f"sigma>0.9: dense(); sigma>0.6: {POLICY}; "
                             + POLICY.replace("0.3", "0.4")})  # fmt: skip
    for level in (1, 0.8, 0.7, 0.6, 0.5):
        run(model, words, level)
    assert reads(calls) == "-crcr"


@torch.no_grad()
def test_texts_and_calls_of_one_step_have_memories_of_their_own(model, calls):
    apply(model, **FIELDS)
    prompt, negative = text(1), text(2)
    for level in (1, 0.9, 0.8):
        shared = latents(int(10 * level))
        for words in (prompt, negative, prompt):
            run(model, words, level, shared)
    assert reads(calls) == "cccrrrrrr"
    first, *others = [[memory for memory, _, _ in calls[place::9]] for place in range(9)]
    assert all(len(set(map(id, own))) == 1 for own in (first, *others))
    assert len({id(own[0]) for own in (first, *others)}) == 9
    run(model, text(1), 0.7)  # the same prompt, told again
    assert reads(calls)[9:] == "c"


def test_drawings_are_told_apart_and_few_are_kept():
    drawings, x, words = Drawings(), torch.zeros(1), [torch.zeros(1) for _ in range(MOST_TEXTS + 1)]

    def enter(text, level, latents=x):
        return drawings.enter({"encoder_hidden_states": text}, latents, level)

    first = enter(words[0], 0.9)
    assert enter(words[0], 0.8, torch.ones(1)) is first and first.step == 2
    branches = [enter(words[1], 0.9) for _ in range(MOST_BRANCHES + 1)]
    assert len(set(map(id, branches))) == MOST_BRANCHES + 1
    assert enter(words[1], 0.8) is branches[-1]  # as many calls in a step are drawings of one step each
    for each in words[2:]:
        enter(each, 0.9)
    assert len(drawings._drawings) == MOST_TEXTS and enter(words[0], 0.7) is not first
    del words[1:], each
    enter(words[0], 0.6)
    assert len(drawings._drawings) == 1
    unknown = enter(None, 0.9)
    assert enter(None, 0.9) is not unknown is enter(None, 0.8) and enter([x], 0.8) is not unknown


def test_pairs_age_where_guidance_leaves_their_text_out():
    drawings, x, texts = Drawings(), torch.zeros(1), (torch.zeros(1), torch.ones(1))
    enter = lambda text, level: drawings.enter({"encoder_hidden_states": text}, x, level)  # noqa: E731
    with_both = [enter(text, 0.9) for text in texts]
    assert [branch.step for branch in with_both] == [1, 1]
    for level in (0.88, 0.86, 0.84):
        enter(texts[0], level)
    assert enter(texts[1], 0.82) is with_both[1] and with_both[1].step == 5


def made(attend_as="") -> tuple[ModuleMemory, Branch, list]:
    """A memory with a branch, and a list of what it hands to the operator: the policy, and whether memory is read."""
    branch, handed = Branch(step=1, sigma=0.9), []

    class Inner:
        def attention(self, call, asked, attend):
            return attend(attend_as)

    forward = SimpleNamespace(call=SimpleNamespace(branch=branch))
    return ModuleMemory(forward, Inner() if attend_as else None), branch, handed


def hand(memory, handed, shape=(1, 2, 256, 64), policy=POLICY):
    def attend(policy, memory=None):
        handed.append((policy, memory and memory.is_read))
        return Result(*torch.zeros(3))

    q = torch.zeros(shape)
    memory.attention(SimpleNamespace(q=q, k=q), Asked(policy, "bf16", "bf16", False), attend)
    return handed[-1][1]


def test_modules_that_caches_skip_choose_when_they_are_called_again():
    memory, branch, handed = made()
    assert hand(memory, handed) is False
    branch.step = 3
    assert hand(memory, handed) is True
    branch.step = 2 + EVERY
    assert hand(memory, handed) is False and (memory.chosen, memory.read) == (2, 1)
    branch.step += 1
    assert hand(memory, handed, policy="importance(budget=0.3, by=pools)") is None
    assert hand(memory, handed, shape=(2, 2, 256, 64)) is False


def test_each_call_of_a_module_in_a_step_has_pairs_of_its_own():
    """A ring calls a module once for each of its chunks of keys, and these calls must not share pairs."""
    memory, branch, handed = made()
    small, large = (1, 2, 256, 64), (1, 2, 384, 64)
    for step, expected in enumerate([[False] * 3, [True] * 3], 1):
        branch.step = step
        assert [hand(memory, handed, shape) for shape in (small, small, large)] == expected
        assert len({id(kept.memory) for kept in branch.kept[memory]}) == 3
    branch.step = 3
    assert [hand(memory, handed, shape) for shape in (small, large, large)] == [True, False, True]
    branch.step = 4
    assert [hand(memory, handed) for _ in range(MOST_CALLS + 1)][MOST_CALLS - 1 :] == [False, None]


def test_what_the_guard_runs_otherwise_is_not_remembered(monkeypatch):
    memory, branch, handed = made(attend_as=DENSE)
    hand(memory, handed)
    branch.step += 1
    memory.inner = None
    assert hand(memory, handed) is False and handed == [(DENSE, None), (POLICY, False)]
    branch.step += 1
    monkeypatch.setattr("dma_diffusers.memory.is_capturing", lambda device: True)
    assert hand(memory, handed) is None


@torch.no_grad()
def test_a_guarded_model_and_a_copy_of_it_remember_the_same(model, calls):
    apply(model, **FIELDS)
    words = text()
    expected = [run(model, words, level, latents(seed)) for seed, level in enumerate((1, 0.9, 0.8))]
    apply(model, **FIELDS, guard=math.inf)
    for each in (model, copy.deepcopy(model)):
        found = [run(each, words, level, latents(seed)) for seed, level in enumerate((1, 0.9, 0.8))]
        assert all(map(torch.equal, found, expected))
    assert reads(calls) == 3 * "crr"
    assert all(module.sampled_rows for module in report(model).modules if module.intercepted)


def test_threads_do_not_mix(model, calls):
    apply(model, **FIELDS)
    barrier, found = threading.Barrier(2), [[], []]
    words = text()  # the same for both

    @torch.no_grad()
    def work(number: int, waits: bool = True) -> None:
        for step, level in enumerate((1, 0.9, 0.8)):
            if waits:
                barrier.wait()
            found[number].append(run(model, words, level - 0.1 * number, latents(10 * number + step)))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 18 and sum(is_read for _, is_read, _ in calls) == 12
    together, found = found, [[], []]
    for number in range(2):
        work(number, waits=False)
    for number in range(2):
        assert all(map(torch.equal, together[number], found[number]))


def test_pipelines_that_share_a_transformer_share_no_pairs(calls):
    """One pipeline draws between two steps of the other."""
    pipe = tiny_pipelines.flux()
    other = type(pipe)(**pipe.components)
    other.scheduler = pipe.scheduler.from_config(pipe.scheduler.config)
    apply(pipe, **FIELDS)

    def draw(of, prompt, levels, between=lambda step: None):
        return of(
            prompt, height=40, width=40, sigmas=levels, output_type="latent",
            generator=torch.Generator().manual_seed(0),
            callback_on_step_end=lambda pipe, step, level, tensors: between(step) or tensors,
        ).images  # fmt: skip

    def cat(between=lambda step: None):
        return draw(pipe, "a cat", [1.0, 0.95, 0.9, 0.85], between)

    def dog():
        return draw(other, "a dog", [1.0, 0.95])

    alone, within = [cat(), dog()], []
    assert reads(calls) == "crrr" + "cr"
    calls.clear()
    found = cat(lambda step: within.append(dog()) if step == 1 else None)
    assert reads(calls) == "cr" + "cr" + "rr"
    assert torch.equal(found, alone[0]) and torch.equal(within[0], alone[1])


@torch.no_grad()
@pytest.mark.parametrize("method", ["compile", "compile_repeated_blocks"])
def test_compiled_models_choose_and_read_in_one_graph(method, calls):
    torch.compiler.reset()
    model = tiny_pipelines.flux().transformer
    apply(model, **FIELDS)
    words, levels = text(), (1, 0.9, 0.8, 0.7, 0.6)
    expected = [run(model, words, level, latents(seed)) for seed, level in enumerate(levels)]
    graphs = Graphs()
    getattr(model, method)(backend=graphs, fullgraph=True)
    found, counts = [], []
    for seed, level in enumerate(levels):
        found.append(run(model, words, level, latents(seed)))
        counts.append(len(graphs.nodes))
    assert all(map(torch.equal, found, expected))
    assert reads(calls) == 2 * "crrcr"
    assert any(graphs.nodes) and set(counts) == {counts[0]}


@torch.no_grad()
def test_without_a_noise_level_every_call_chooses(model, calls, monkeypatch):
    apply(model, **FIELDS)
    monkeypatch.setattr(Family, "noise_level", lambda family, timestep: None)
    for level in (1, 0.9):
        run(model, text(), level)
    assert reads(calls) == "--"
    for module in report(model).modules:
        assert UNTOLD in module.notes
        assert "importance was found in 2 calls, and remembered in 0" in module.notes


@torch.no_grad()
def test_a_graph_of_the_whole_model_reads_no_noise_level(model, calls, monkeypatch):
    apply(model, **FIELDS)
    assert not any("remembered" in note for module in report(model).modules for note in module.notes)
    monkeypatch.setattr("dma_diffusers.forward.is_capturing", lambda device: True)
    monkeypatch.setattr(torch.Tensor, "__float__", lambda x: pytest.fail("a capture would fail"))
    for level in (1, 0.9):
        run(model, text(), level)
    assert reads(calls) == "--"


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.kernel
@needs_gpu
@torch.no_grad()
def test_kernels_read_what_they_wrote():
    """The same numbers give the same bits, chosen or read; others are attended to by the pairs that were chosen."""
    generator = torch.Generator("cuda").manual_seed(0)
    draws = (torch.randn(2, 2, 1300, 64, generator=generator, device="cuda") for _ in range(3))
    q, k, v = (3 * x.bfloat16() for x in draws)
    memory, branch, _ = made()

    def attend(q, observer=None, policy=POLICY):
        return operator.attention(q, k, v, high="bf16", low="int8", policy=policy, observer=observer).out

    wanted = attend(q, policy=BY_ROWS)
    for step in range(1, EVERY):
        branch.step = step
        assert torch.equal(attend(q, memory.handle), wanted)
    branch.step = EVERY
    assert not torch.equal(attend(-q, memory.handle), attend(-q, policy=BY_ROWS))
    branch.step = EVERY + 1
    assert torch.equal(attend(-q, memory.handle), attend(-q, policy=BY_ROWS))
    assert (memory.chosen, memory.read) == (2, EVERY - 1)


@pytest.mark.kernel
@needs_gpu
@torch.no_grad()
def test_cuda_graphs_of_torch_compile_leave_the_choice_out(calls):
    torch.compiler.reset()
    model = tiny_pipelines.flux(head_dim=64).transformer.to("cuda", torch.bfloat16)
    apply(model, **FIELDS | {"low": "int8"})
    expected = []
    for drawing in range(4):  # eager, a warm-up, a recording, a replay
        if drawing == 1:
            model.compile_repeated_blocks(mode="reduce-overhead", fullgraph=True)
        calls.clear()
        words = text().to("cuda", torch.bfloat16)
        for step, level in enumerate((1, 0.9, 0.8, 0.7, 0.6)):
            torch.compiler.cudagraph_mark_step_begin()
            out = run(model, words, level, latents(step).to("cuda", torch.bfloat16)).clone()
            expected.append(out)
            torch.testing.assert_close(out, expected[step], rtol=0.05, atol=0.05)
        assert reads(calls) == "crrcr"
