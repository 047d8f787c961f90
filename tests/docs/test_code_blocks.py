"""Every block of code on the pages runs: Python on tiny pipelines; commands are parsed, and what they name is there."""

import ast
import doctest
import inspect
import re
import subprocess
from importlib.util import find_spec

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

import dma_diffusers
from dma_diffusers.eval.quality.configurations import read as read_configurations
from dma_diffusers.eval.quality.prompts import read_prompts
from dma_diffusers.pipelines.finetuning.save import save_trained
from dma_diffusers.pipelines.jobs import read_jobs
from tests.docs.blocks import HEREDOC, RUN, Block, blocks, commands, names, parse
from tests.docs.site import ROOT
from tests.tiny_pipelines import draw

# These words begin lines that run no command of this project.
OTHERS = {"cat", "mkdir", "npm", "tar", "for", "run()", "train()", "train"}
# Fewer steps, smaller pictures, and the architecture of every machine.
SUBSTITUTES = {
    "**arguments": "**arguments | {'num_inference_steps': 1}",
    "num_inference_steps=8": "num_inference_steps=1",
    '"256x256"': '"16x16"',
    'choose("sm_90"': 'choose("cpu"',
}
ANEW = ("apply", "quantize_linears")


def test_every_block_is_in_a_language_that_is_tested():
    assert {block.language for block in blocks("")} == {"bash", "json", "python"}
    assert [block for block in blocks("") if block.page == "README.md"]


def run(code: str, found: dict) -> None:
    """Run statements one by one. Where several apply something, these are alternatives: each is drawn with alone."""
    for old, new in SUBSTITUTES.items():
        code = code.replace(old, new)
    for statement in ast.parse(code).body:
        called = statement.value if isinstance(statement, ast.Expr) else None
        if isinstance(called, ast.Call) and getattr(called.func, "id", "") in ANEW:
            draw_with_what_is_applied(found["pipe"])
            dma_diffusers.restore(found["pipe"])
        exec(compile(ast.Module([statement], []), "block", "exec"), found)
    draw_with_what_is_applied(found["pipe"])


def draw_with_what_is_applied(pipe) -> None:
    """Draw, if attention of this process alone is applied."""
    applied = dma_diffusers.report(pipe).modules
    if applied and pipe.transformer._parallel_config is None:
        assert draw(pipe).isfinite().all()
        modules = dma_diffusers.report(pipe).modules
        assert any(module.intercepted for module in modules) or {each.lowering for each in modules} == {
            "stock"
        }


@pytest.fixture
def two_processes(monkeypatch):
    """A group of which this process is one of two; the other answers nothing."""
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)  # Diffusers divides by it
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python(block: Block, request, tmp_path, monkeypatch):
    if "ContextParallelConfig" in block.code:
        request.getfixturevalue("two_processes")
    for folder in ("pipelines", "examples"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    found = names(block.code)
    if "tuned/" in block.code:
        (tmp_path / "tuned").mkdir()
        config = dma_diffusers.DMAConfig()
        save_trained(found["pipe"], "transformer", config, "qat", False, {}, tmp_path / "tuned")
    run(block.code, found)


@pytest.mark.parametrize("name", dma_diffusers.__all__)
def test_examples_of_docstrings(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "".join(example.source for example in doctest.DocTestParser().get_examples(
        inspect.getdoc(getattr(dma_diffusers, name))
    ))  # fmt: skip
    found = names(code)
    if name == "load_linears":
        dma_diffusers.quantize_linears(found["pipe"], "int8")
        dma_diffusers.save_linears(found["pipe"], "linears.safetensors")
        dma_diffusers.restore(found["pipe"])
    if name == "report":
        dma_diffusers.apply(found["pipe"])
    assert f"{name}(" in code
    run(code, found)


@pytest.mark.parametrize("block", blocks("bash"), ids=str)
def test_commands(block: Block, tmp_path, monkeypatch):
    done = subprocess.run(["bash", "-n"], input=block.code, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    recipe = RUN.search(block.code)
    module = recipe[1] if recipe else f"dma_diffusers.{block.page.rsplit('/', 1)[0].replace('/', '.')}"
    monkeypatch.chdir(tmp_path)
    for name, _, text in HEREDOC.findall(block.code):
        (tmp_path / name).write_text(text)
        read = read_configurations if name.endswith(".yaml") else read_prompts
        assert read(tmp_path / name)
    for first, *words in commands(block.code):
        if first == "dma-diffusers":
            parse(words)
        elif first == "make":
            assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        elif first == "pip":
            assert words == ["install", ".[demo]"]
        elif first == "run":
            assert find_spec(f"{module}.{words[0]}")
        elif first == "python" and words[0] == "-m":
            assert find_spec(words[1])
        elif first == "python":
            path = ROOT / words[0]
            options = {word.removeprefix("--") for word in words if word.startswith("--")}
            assert options <= {"model", "output", *re.findall(r"(\w+)=\d+", path.read_text())}
        else:
            assert first in OTHERS, first


def test_a_wrong_command_is_noticed():
    for wrong in (
        "eval --promts a.txt -o run",
        "bench atention",
        "eval -o run --config low=int9",
        "generate a -o a.png --policy importence(budget=1)",
    ):
        with pytest.raises(Exception, match=r"No such option|No such command|unknown|is no policy"):
            parse(wrong.split())


@pytest.mark.parametrize("block", blocks("json"), ids=str)
def test_jobs(block: Block, tmp_path):
    path = tmp_path / "jobs.jsonl"
    path.write_text(block.code)
    jobs, failures = read_jobs(path, {})
    assert len(jobs) == len(block.code.splitlines()) and not failures
