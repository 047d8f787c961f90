"""Functions here find the code blocks of pages, and give what stands in the place of large models."""

import re
import shlex
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from typer.main import get_command

import dma_diffusers
from dma_diffusers.cli import app
from dma_diffusers.eval.quality.configurations import parse as parse_configuration
from dma_diffusers.kernels.tiling.policies import parse as parse_policy
from dma_diffusers.schedule import read as read_schedule
from tests import tiny_pipelines
from tests.docs.site import ROOT, pages

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HEREDOC = re.compile(r"> (\S+) <<'(\w+)'\n(.*?)^\2$", re.MULTILINE | re.DOTALL)
# The shell functions of the recipes that trained the embedded models.
RUN = re.compile(r'^run\(\) \{.*python -m (dma_diffusers(?:\.\w+)+)\."\$@"; \}$', re.MULTILINE)
OURS = re.compile(
    r"(python|accelerate launch|python3 -m torch\.distributed\.run --nproc-per-node \d+) -m dma_diffusers(?=\s)"
)
VARIABLE = re.compile(r'^(\w+)="(.*)".*$', re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A block of code on a page; line is that of its first fence."""

    page: str
    line: int
    language: str
    code: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(language: str) -> list[Block]:
    """Return the blocks in one language on all pages of the site; in any language for an empty one."""
    found = []
    for page in pages():
        text = (ROOT / page).read_text()
        for block in BLOCK.finditer(text):
            if language in ("", block[1]):
                found.append(Block(page, text[: block.start()].count("\n") + 1, block[1], block[2]))
    return found


def commands(code: str) -> list[list[str]]:
    """Return the words of each command of a block of shell, without comments and heredocs, with variables put in.

    An ellipsis in quotes is a prompt.
    """
    lines = VARIABLE.sub("", HEREDOC.sub("", code)).replace("\\\n", " ").replace('"…"', "prompt")
    for name, value in VARIABLE.findall(code):
        lines = lines.replace(f"${name} ", f"{value} ")
    lines = OURS.sub("dma-diffusers", lines)
    found = [shlex.split(part, comments=True) for line in lines.splitlines() for part in line.split(" && ")]
    return [words for words in found if words]


def parse(words: list[str]) -> dict[str, Any]:
    """Return the options of a command line of ours, which is not run; none where an ellipsis leaves out what it needs.

    Raises what the command would for what was given.
    """
    command, context = get_command(app), None
    is_whole, words = "…" not in words, [word for word in words if word != "…"]
    name = "dma-diffusers"
    while hasattr(command, "resolve_command"):
        context = command.context_class(command, info_name=name, parent=context)
        name, command, words = command.resolve_command(context, words)
    try:
        given = command.make_context(name, list(words), parent=context).params
    except Exception as error:  # Typer has click's classes inside of it, or beside it
        if is_whole or type(error).__name__ != "MissingParameter":
            raise
        return {}
    for text in given.get("config") or ():
        parse_configuration(text)
    if (given.get("policy") or "").endswith(")"):
        parse_policy(given["policy"])
    if given.get("schedule"):
        read_schedule(given["schedule"])
    return given


def small(pipe: Any) -> Any:
    """Return a tiny pipeline with pictures that are small where a call does not say otherwise."""
    pipe.default_sample_size = 16
    return pipe


def names(code: str) -> dict[str, Any]:
    """Return what Python code finds: public names, prompts, and a tiny pipeline, of clips for a grid of clips."""
    pipe = small(tiny_pipelines.hunyuan() if "grid=(30, 48, 80)" in code else tiny_pipelines.flux())
    generator = torch.Generator().manual_seed(0)
    return {
        **{name: getattr(dma_diffusers, name) for name in dma_diffusers.__all__},
        "FluxPipeline": SimpleNamespace(from_pretrained=lambda *given: pipe),
        "pipe": pipe,
        "prompts": ["a red apple left of a cat"],
        "x": torch.randn(4, 3072, generator=generator),
        "layer": torch.nn.Linear(3072, 64),
        "weight": torch.randn(64, 3072, generator=generator),
        "bias": torch.zeros(64),
        "permutation": torch.randperm(3072, generator=generator),
    }
