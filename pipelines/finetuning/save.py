"""Write what Diffusers loads, whole or not at all, with the policy that it was trained for beside it."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from dma_diffusers.components import attention_modules
from dma_diffusers.config import DMAConfig
from dma_diffusers.families import family_of, known_family
from dma_diffusers.fingerprint import fingerprint
from dma_diffusers.pipelines.files import temporary_folder, write_atomically
from dma_diffusers.policy_file import FORMAT, VERSION

POLICY, LORA = "policy.json", "lora"


def save_trained(
    pipe: DiffusionPipeline,
    component: str,
    config: DMAConfig | None,
    linears: str | None,
    lora: bool,
    evidence: dict[str, Any],
    folder: Path,
) -> Path:
    """Write a component whose stock layers are back into `folder`, and return where its weights are.

    They are in a folder of the component's name, for `from_pretrained`, or in `lora`, for `load_lora_weights`, which
    takes `load_into_transformer_2=True` where the component is Wan's second transformer.
    `policy.json` is for `DMAConfig.from_file`, with which the component draws as it was trained. linears: the recipe of
    its linear layers. evidence: how it was trained, for whoever reads the policy.
    """
    model = pipe.components[component]
    target = folder / (LORA if lora else component)
    with temporary_folder(folder) as unfinished:
        if lora:
            from peft import get_peft_model_state_dict

            layers = get_peft_model_state_dict(model)
            # Diffusers has one name for all components, and is told which one at loading.
            type(pipe).save_lora_weights(unfinished, transformer_lora_layers=layers)
        else:
            model.save_pretrained(unfinished)
        shutil.rmtree(target, ignore_errors=True)
        unfinished.rename(target)
    config = replace(config or DMAConfig.preset("exact"), linears=linears)
    policy = _policy(model, config, evidence)
    write_atomically(folder / POLICY, json.dumps(policy, indent=1).encode())
    return target


def _policy(model: torch.nn.Module, config: DMAConfig, evidence: dict[str, Any]) -> dict[str, Any]:
    """Return a policy file of a single choice."""
    fields = asdict(config)
    own = {name: dict(changes) for name, changes in fields.pop("modules")}
    for name in ("model", "weights"):
        del fields[name]
    family = family_of(model, config.text) if config.text else known_family(model)
    modules = [name for name, _ in attention_modules(model) if not (family and family.stock_role(name))]
    choice = {"quality": 1, "config": fields, "modules": own, "evidence": {}}
    about = {"class": type(model).__name__, "modules": modules, "fingerprint": fingerprint(model)}
    return {
        "format": FORMAT, "version": VERSION, "quality": 1, "model": about, "choices": [choice], "evidence": evidence,
    }  # fmt: skip
