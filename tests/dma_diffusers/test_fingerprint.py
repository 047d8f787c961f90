"""Fingerprints tell weights apart, and a policy for other weights says so wherever it is used."""

import json
import logging

import pytest
import torch

from dma_diffusers import DMAConfig, apply, quantize_linears, report, restore
from dma_diffusers.cli.attention import Attention
from dma_diffusers.fingerprint import OTHER_WEIGHTS, are_other_weights, fingerprint
from tests import tiny_pipelines
from tests.dma_diffusers.test_policy_file import document


def tuned(pipe):
    """The pipeline, with the weights of a fine-tune."""
    torch.manual_seed(7)
    for parameter in pipe.transformer.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return pipe


def notes(pipe) -> set[str]:
    return {note for module in report(pipe).modules for note in module.notes}


@pytest.fixture
def policy(tmp_path):
    """A policy file for the tiny FLUX."""
    content = document()
    content["model"]["fingerprint"] = fingerprint(tiny_pipelines.flux().transformer)
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(content))
    return path


def test_each_parameter_counts():
    model = tiny_pipelines.flux().transformer
    known = fingerprint(model)
    assert fingerprint(tiny_pipelines.flux().transformer) == known
    for name, parameter in model.named_parameters():
        kept = parameter.data.clone()
        parameter.data.view(-1)[0] += 1
        assert fingerprint(model) != known, name
        parameter.data.copy_(kept)


def test_dtype_and_adapters_do_not_count():
    pipe = tiny_pipelines.flux()
    known = fingerprint(pipe.transformer)
    assert fingerprint(tiny_pipelines.flux().transformer.bfloat16()) == known
    from peft import LoraConfig

    pipe.transformer.add_adapter(LoraConfig(target_modules=["to_q", "to_k"]))
    assert fingerprint(pipe.transformer) == known


@pytest.mark.parametrize("absent", [
    lambda model: model.to("meta"),
    lambda model: quantize_linears(model, "int8"),
    lambda model: model.to(torch.float8_e4m3fn),
])  # fmt: skip
def test_weights_that_are_not_at_hand_have_none(absent):
    model = tiny_pipelines.flux().transformer
    known = fingerprint(model)
    absent(model)
    assert fingerprint(model) is None and not are_other_weights(model, "0")
    assert known is not None


def test_a_policy_for_these_weights_says_nothing(policy, caplog):
    pipe = tiny_pipelines.flux()
    with caplog.at_level(logging.WARNING, "dma_diffusers"):
        apply(pipe, DMAConfig.from_file(policy))
        apply(pipe.to(torch.bfloat16), DMAConfig.from_file(policy))
    assert OTHER_WEIGHTS not in notes(pipe) and OTHER_WEIGHTS not in caplog.text


def test_a_policy_for_other_weights_says_so(policy, caplog):
    pipe = tuned(tiny_pipelines.flux())
    with caplog.at_level(logging.WARNING, "dma_diffusers"):
        apply(pipe, DMAConfig.from_file(policy))
    assert OTHER_WEIGHTS in notes(pipe) and OTHER_WEIGHTS in caplog.text
    assert f"note: {OTHER_WEIGHTS}" in str(report(pipe))
    restore(pipe)
    apply(pipe, DMAConfig.from_file(policy, weights=None))
    assert OTHER_WEIGHTS not in notes(pipe)


def test_the_command_line_names_file_quality_and_other_weights(policy):
    pipe = tuned(tiny_pipelines.flux())
    apply(pipe, DMAConfig.from_file(policy, 0.7))
    tiny_pipelines.draw(pipe)
    chosen = Attention(DMAConfig.from_file(policy, 0.7), policy, 0.7)
    assert (
        chosen.label(report(pipe)) == f"DMA as {policy.name} chooses for quality 0.7, made for other weights"
    )
    assert (
        Attention(chosen.config, policy).label(report(pipe))
        == f"DMA as {policy.name} chooses, made for other weights"
    )


def test_one_of_several_transformers_is_enough():
    model, other = tiny_pipelines.flux().transformer, tuned(tiny_pipelines.flux()).transformer
    both = f"{fingerprint(model)}+{fingerprint(other)}"
    assert not are_other_weights(model, both) and not are_other_weights(other, both)
    assert are_other_weights(model, fingerprint(other))


@pytest.mark.parametrize("weights", [None, ""])
def test_unknown_weights_fit_all(weights):
    assert not are_other_weights(tiny_pipelines.flux().transformer, weights)


def test_weights_must_be_words():
    with pytest.raises(ValueError, match="weights must be fingerprints, or None, got 3"):
        DMAConfig(weights=3)
