"""Schedules: words and pairs are read and written, entries are found by noise level, and bad ones are one line."""

import json
from dataclasses import asdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dma_diffusers import DMAConfig, schedule
from dma_diffusers.families import FAMILIES, Family
from dma_diffusers.kernels.tiling.policies import (
    Dense,
    Diagonal,
    Importance,
    Neighborhood,
    SkipSoftmax,
    parse,
)
from dma_diffusers.kernels.tiling.precision_map import Class
from dma_diffusers.schedule import MOST_ENTRIES, Part
from dma_diffusers.stages import Stages, stages

WORDS = "sigma>0.9: dense(); sigma>0.5: importance(budget=0.15) high=int8/bf16; importance(budget=0.05)"
KEPT = WORDS.replace("dense()", "dense(everywhere=high)").replace("int8/bf16", "int8")
PAIRS = (
    (0.9, Dense()),
    (0.5, {"policy": "importance(budget=0.15)", "high": "int8"}),
    (0, "importance(budget=.05)"),
)
DENSE = str(Dense())
MODULES = ("blocks.0.attn1", "blocks.1.attn1", "blocks.2.attn1")
WAN = "WanTransformer3DModel"


def test_words_and_pairs_say_the_same():
    config = DMAConfig(schedule=WORDS)
    assert config == DMAConfig(schedule=PAIRS) == DMAConfig(schedule=[list(pair) for pair in PAIRS])
    assert config.schedule == KEPT and DMAConfig(schedule=KEPT) == config
    assert DMAConfig(**json.loads(json.dumps(asdict(config)))) == config and hash(config) == hash(
        DMAConfig(schedule=PAIRS)
    )
    assert DMAConfig.from_fields(
        {"schedule": json.loads(json.dumps([[0.9, "dense()"], [0, {"low": "int8"}]]))}
    ) == (DMAConfig(schedule="sigma>.9:dense();low=int8"))
    assert DMAConfig(schedule="sigma > 1e-3 :\n window=0/384 ; sink=0").schedule == (
        "sigma>0.001: diagonal(window=0/384, sink=128); diagonal(window=128, sink=0)"
    )


def test_an_entry_has_the_configurations_other_fields():
    config = DMAConfig(
        policy="importance(budget=0.1)", low="int8", min_length=7,
        schedule="sigma>0.9: dense(); sigma>0.5: high=bf16; low=nvfp4/bf16",
    )  # fmt: skip
    common = {"high": "mxfp8", "low": "int8", "min_length": 7}
    found = [(entry.above, entry.config) for entry in config.entries]
    assert found == [
        (0.9, DMAConfig(**common, policy=DENSE)),
        (0.5, DMAConfig(**common | {"high": "bf16"}, policy="importance(budget=0.1)")),
        (0, DMAConfig(**common | {"low": "nvfp4/bf16"}, policy="importance(budget=0.1)")),
    ]
    assert DMAConfig(window=384).entries == ((0.0, DMAConfig(window=384)),)


def test_an_entry_has_rotations_smoothing_and_unprotected_text_of_its_own():
    entries = (
        "rotation=none/hadamard32 smooth_k=false",
        "smooth_v=false protect_text=false",
        "smooth_v=true",
    )
    words = f"sigma>0.9: {entries[0]}; sigma>0.5: {entries[1]}; {entries[2]}"
    config = DMAConfig(schedule=words, rotation="hadamard16", smooth_v=False)
    assert config.schedule == words
    found = [config for _, config in config.entries]
    assert [each.rotation for each in found] == ["none/hadamard32", "hadamard16", "hadamard16"]
    assert [each.smooth_k for each in found] == [False, True, True]
    assert [each.smooth_v for each in found] == [False, False, True]
    assert [each.protect_text for each in found] == [True, False, True]
    pairs = [
        [0.9, {"rotation": "none/hadamard32", "smooth_k": False}],
        [0.5, {"smooth_v": False, "protect_text": False}],
        [0, {"smooth_v": True}],
    ]
    assert DMAConfig(schedule=pairs, rotation="hadamard16", smooth_v=False) == config
    assert DMAConfig(**json.loads(json.dumps(asdict(config)))) == config


def test_what_a_module_says_of_its_own():
    config = DMAConfig(
        schedule=KEPT,
        modules={
            "policy": {"policy": "dense(everywhere=low)"}, "window": {"window": 384}, "formats": {"high": "bf16"},
            "schedule": {"schedule": [[0.3, "dense()"], [0, {"window": [0, 384]}]], "low": "int8"},
        },
    )  # fmt: skip
    assert config.of_module("other") == DMAConfig(schedule=KEPT)
    assert config.of_module("policy") == DMAConfig(policy="dense(everywhere=low)")
    assert config.of_module("window") == DMAConfig(window=384)
    highs = [entry.config.high for entry in config.of_module("formats").entries]
    assert highs == ["bf16", "int8", "bf16"]  # the entry's own goes before
    own = f"sigma>0.3: {DENSE}; diagonal(window=0/384, sink=128)"
    assert config.of_module("schedule") == DMAConfig(schedule=own, low="int8")
    assert DMAConfig(**json.loads(json.dumps(asdict(config)))) == config
    with_policy = DMAConfig(policy="importance(budget=0.1)", modules={"a": {"schedule": KEPT}})
    assert with_policy.of_module("a") == DMAConfig(schedule=KEPT)
    formats = DMAConfig(
        policy="importance(budget=0.1)", modules={"a": {"schedule": "sigma>0.5: high=bf16; high=int8"}}
    )
    assert {entry.config.words for entry in formats.of_module("a").entries} == {"importance(budget=0.1)"}


@pytest.mark.parametrize(("given_", "words"), [
    ("sigma>0.5: dense(); sigma>0.9: dense(); dense()", r"sigma>0\.9 stands after sigma>0\.5, .* entries overlap"),
    ("sigma>0.5: dense(); sigma>0.5: dense(); dense()", r"sigma>0\.5 stands after sigma>0\.5, .* entries overlap"),
    ("dense(); sigma>0.5: dense(); dense()", r"sigma>0\.5 stands after sigma>0\.0, .* entries overlap"),
    ("sigma>0.9: dense(); sigma>0.5: dense()", r"nothing holds from sigma 0\.5 down to 0: after sigma>0\.5 give an"),
    ([[0.9, "dense()"]], r"nothing holds from sigma 0\.9 down to 0"),
    ("sigma>=0.9: dense(); dense()", r"'sigma>=0\.9: dense\(\)' is no entry: give sigma>LEVEL:"),
    ("sigma<0.9: dense(); dense()", "is no entry: give sigma>LEVEL:"),
    ("sigma>x: dense(); dense()", "a noise level is a number from 0 to less than 1, got 'x'"),
    ("sigma>nan: dense(); dense()", "a noise level is a number from 0 to less than 1, got nan"),
    ([[1, "dense()"], [0, "dense()"]], "a noise level is a number from 0 to less than 1, got 1"),
    ([[True, "dense()"], [0, "dense()"]], "from 0 to less than 1, got True"),
    ([[-0.1, "dense()"]], "from 0 to less than 1, got -0.1"),
    ("", "'' is no entry"), ("sigma>0.9: dense();; dense()", "'' is no entry"), ([], "give at least one entry"),
    ("dense", "'dense' is no entry: give a policy, or any of policy, high, low, window, sink, rotation"),
    ("rotation=spin", "unknown rotation 'spin'"), ("min_length=9", "is no entry: give a policy, or any of"),
    ("smooth_k=maybe", "smooth_k must be true or false, got 'maybe'"),
    ("protect_text=0", "protect_text must be true or false, got '0'"),
    ([[0, {"smooth_v": 1}]], "smooth_v must be true or false, got '1'"),
    ("dense() dense()", "is no entry"), ("low=int8 low=fp8", "is no entry"), ("budget=1", "is no entry"),
    ([[0, {}]], "{} is no entry"), ([[0, {"dense": True}]], "is no entry: give a policy"), ([[0, 3]], "3 is no entry"),
    ([[0, {"policy": 3}]], "policy must be a policy or its words, got 3"),
    ("dens()", r"schedule: 'dens\(\)' is no policy: give dense"), ("low=int3", "schedule: unknown format 'int3'"),
    ("importance(budget=3)", "schedule: budget must be over 0 and at most 1, got 3"),
    ("window=-1", "schedule: window must be a whole number of tokens, 0 or more, got '-1'"),
    ("dense() window=384", "window and sink are those of a diagonal: leave them out, or dense"),
    (3, "schedule must be words, .* or pairs"), ([0.9, "dense()"], "or pairs of a noise level"), ([[0]], "or pairs"),
    ("sigma>.8: low=int8; sigma>.6: low=fp8; sigma>.4: low=int8; sigma>.2: low=fp8; low=int8",
     "schedule: at most 4 entries, for some are compiled apart, got 5"),
])  # fmt: skip
def test_bad_schedules_are_one_line(given_, words):
    with pytest.raises(ValueError, match=words) as error:
        DMAConfig(schedule=given_)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=f"modules: attn: .*{words}"):
        DMAConfig(modules={"attn": {"schedule": given_}})


@pytest.mark.parametrize(("fields", "words"), [
    ({"dense_above_sigma": 0.7}, r"dense_above_sigma=0\.7 and a schedule: .*, sigma>0\.7: dense\(\)"),
    ({"policy": "importance(budget=0.1)"}, r"every entry .*: leave them out, or importance\(budget=0\.1\)"),
    ({"window": 384}, r"leave them out, or diagonal\(window=384, sink=128\)"),
    ({"modules": {"a": {"dense": True, "schedule": "dense()"}}}, "modules: a: dense and a schedule: give one of them"),
    ({"modules": {"a": {"policy": "dense()", "schedule": "dense()"}}}, "modules: a: every entry .* has a policy"),
])  # fmt: skip
def test_fields_that_contradict_a_schedule(fields, words):
    with pytest.raises(ValueError, match=words):
        DMAConfig(schedule=KEPT, **fields)
    assert DMAConfig(schedule=KEPT, dense_above_sigma=1).schedule == KEPT


def test_presets_keep_their_policy_where_an_entry_needs_it(monkeypatch):
    monkeypatch.setattr("dma_diffusers.config.lowerings.architecture", lambda device: "sm_90")
    assert DMAConfig.preset("auto", schedule="sigma>0.9: dense(); low=fp8").policy == "dense(everywhere=low)"
    assert DMAConfig.preset("auto", schedule="sigma>0.9: dense(); dense(everywhere=low)").policy is None
    with pytest.raises(ValueError, match="preset 'exact' quantises nothing, so it takes no schedule"):
        DMAConfig.preset("exact", schedule="dense()")


def test_text_that_is_not_protected_is_refused_for_a_grid_in_any_entry():
    with pytest.raises(ValueError, match="protect_text=False is for policies without a grid"):
        DMAConfig(protect_text=False, schedule="sigma>0.9: dense(); neighborhood(window=9x8)")


def test_a_lowering_is_checked_for_the_formats_of_every_entry():
    config = DMAConfig(lowering="native", high="bf16", low="int8", schedule="sigma>0.9: dense(); low=mxfp4")
    with pytest.raises(ValueError, match="native"):
        config.check_device(torch.device("cpu"))


LEVELS = st.floats(1e-6, 1, exclude_max=True)
POLICIES = st.one_of(
    st.builds(Dense, st.sampled_from([Class.HIGH, Class.LOW])),
    st.builds(
        Diagonal, st.integers(0, 9999) | st.lists(st.integers(0, 999), min_size=2, max_size=4).map(tuple)
    ),
    st.builds(Importance, st.floats(1e-6, 1)),
    st.builds(Neighborhood, st.lists(st.integers(1, 99), min_size=2, max_size=2).map(tuple)),
    st.tuples(st.builds(Importance, st.floats(1e-6, 1)), st.builds(SkipSoftmax, st.floats(1e-6, 0.9))).map(
        lambda pair: pair[0] | pair[1]
    ),
)
PARTS = st.tuples(
    st.none() | POLICIES.map(str), st.none() | st.sampled_from(["bf16", "mxfp8/fp8"]),
    st.none() | st.sampled_from(["int8", "nvfp4/bf16"]),
    st.none() | st.sampled_from(["none", "head_dim", "none/hadamard32"]), *[st.none() | st.booleans()] * 2,
).filter(lambda own: set(own) != {None})  # fmt: skip


@st.composite
def parts(draw) -> tuple[Part, ...]:
    above = sorted(draw(st.sets(LEVELS, max_size=MOST_ENTRIES - 1)), reverse=True)
    return tuple(Part(level, *draw(PARTS)) for level in (*above, 0.0))


@given(parts(), st.floats(0, 1))
def test_words_are_read_back_and_one_entry_holds_at_every_level(made, sigma):
    words = schedule.write(made)
    assert schedule.read(words) == made and schedule.write(schedule.read(words)) == words
    assert schedule.read([(part.above, part.fields) for part in made]) == made
    if all(part.policy for part in made):
        config = DMAConfig(schedule=words)
    else:
        config = DMAConfig(schedule=words, policy="dense(everywhere=low)")
    found = stages(config, Family("none"), "Model", ("attn",)).at("attn", sigma)
    level = torch.tensor(sigma).item()
    holding = [part for part in made if level > torch.tensor(part.above).item()] or made[-1:]
    assert parse(found.words) == parse(holding[0].policy or "dense(everywhere=low)")
    assert found.high == (holding[0].high or "mxfp8") and found.low == (holding[0].low or "mxfp4")
    assert found.rotation == (holding[0].rotation or "none")
    assert [found.smooth_k, found.smooth_v] == [each is not False for each in holding[0][5:7]]


@given(st.text(alphabet="sigma>0.95:;= dens()lowint8,|", max_size=40))
def test_any_text_is_read_or_refused_in_one_line(text):
    try:
        kept = DMAConfig(schedule=text).schedule
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert DMAConfig(schedule=kept).schedule == kept


def made(available=MODULES, **fields) -> Stages:
    return stages(DMAConfig(**fields), FAMILIES[WAN], WAN, available)


def policies(found: Stages, sigma: float | None) -> list[str]:
    return [found.at(name, sigma).words for name in found.modules]


def test_schedules_of_modules_are_stages_of_the_model():
    own = {
        MODULES[0]: {"schedule": "sigma>0.4: importance(budget=0.5); importance(budget=0.4)"},
        MODULES[1]: {"policy": "importance(budget=0.3)"},
    }
    found = made(schedule="sigma>0.9: dense(); importance(budget=0.1)", modules=own)
    assert found.above == (0.9, 0.4) and [own.of_stage for own in found.modules.values()] == [
        (0, 0, 1), (0, 0, 0), (0, 1, 1),
    ]  # fmt: skip
    half, third, rest = ("importance(budget=0.5)", "importance(budget=0.3)", "importance(budget=0.1)")
    assert policies(found, 0.95) == policies(found, None) == [half, third, DENSE]
    assert policies(found, 0.9) == policies(found, 0.5) == [half, third, rest]
    assert policies(found, 0.4) == policies(found, 0) == ["importance(budget=0.4)", third, rest]
    assert found.modules[MODULES[2]].words == (f"sigma>0.9: {DENSE}", rest)


def test_a_level_at_a_threshold_is_not_above_it():
    found = made(schedule="sigma>0.6: dense(); sigma>0.3: dense(everywhere=low); importance(budget=0.1)")
    for level in (0.6, 0.3):  # in float32 .6 is a little more, .3 too
        assert found.number(torch.tensor(level).item()) == found.number(level) == {0.6: 1, 0.3: 2}[level]


def test_too_many_levels_between_modules_are_refused():
    own = {name: {"schedule": f"sigma>0.{i}: dense(); high=bf16"} for i, name in enumerate(MODULES, 5)}
    assert made(modules=own).above == (0.7, 0.6, 0.5)
    with pytest.raises(
        ValueError, match=r"have the noise levels 0\.9, 0\.7, 0\.6, 0\.5 between them: at most 3"
    ):
        made((*MODULES, "blocks.3.attn1"), modules=own, schedule="sigma>0.9: dense(); dense(everywhere=low)")


def test_a_schedule_replaces_the_familys_dense_steps_but_not_its_layers():
    near = "neighborhood(window=9x8)"
    found = made(schedule=f"sigma>0.5: {near} | importance(budget=0.1); {near}")
    assert found.above == (0.5,) and found.modules[MODULES[0]].words == (DENSE,)
    assert found.note.startswith("dense layers by default: ")
    assert made(schedule=f"sigma>0.5: dense(); {near}", dense_layers=()).note == ""
    quality = made((*MODULES, "3", "4"), schedule=f"sigma>0.5: dense(); {near}", quality_first=True)
    dense = [own.words == (DENSE,) for own in quality.modules.values()]
    assert dense == [True, True, False, True, True] and quality.above == (0.5,)
    mixed = made(policy=near, modules={MODULES[1]: {"schedule": f"sigma>0.5: dense(); {near}"}})
    assert mixed.above == (0.907, 0.5)  # of the modules without a schedule of their own
    assert mixed.modules[MODULES[1]].words == (f"sigma>0.5: {DENSE}", near)
    assert mixed.modules[MODULES[2]].words == (f"sigma>0.907: {DENSE}", near)
