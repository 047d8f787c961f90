"""Guards of the package's layout: what a wheel holds, what an import brings along, and where pages lead."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("kernels", "pipelines", "eval")
# The recipes that trained the embedded models, and the study that trains them on, are run from a checkout alone.
RECIPES = (
    "pipelines/demo_training/",
    "pipelines/demo_video_training/",
    "eval/alignment_training/",
    "eval/recovery/",
)


def python(code: str) -> str:
    """Returns what `code` prints in a fresh interpreter started in the checkout's root."""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout


@pytest.fixture(scope="module")
def sources() -> list[str]:
    """Paths of the checkout's files, build outputs left out."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [path for path in listed.stdout.splitlines() if (ROOT / path).is_file()]


@pytest.fixture(scope="module")
def wheel(sources, tmp_path_factory) -> set[str]:
    """The paths in a wheel built from a copy of the checkout."""
    copy = tmp_path_factory.mktemp("checkout")
    for path in sources:
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, copy / path)
    build = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=copy, check=True, capture_output=True)
    (built,) = (copy / "dist").glob("*.whl")
    return set(zipfile.ZipFile(built).namelist())


def test_the_wheel_keeps_to_its_own_name(wheel):
    roots = {path.split("/")[0] for path in wheel}
    assert {root for root in roots if not root.endswith(".dist-info")} == {"dma_diffusers"}


def test_every_module_but_the_recipes_is_in_the_wheel(sources, wheel):
    modules = [path for path in sources if path.endswith(".py") and not path.startswith(RECIPES)]
    expected = {path for path in modules if path.startswith("dma_diffusers/")}
    expected |= {f"dma_diffusers/{path}" for path in modules if path.split("/")[0] in ROOMS}
    assert len(expected) > 20
    assert expected <= wheel


def test_the_recipes_are_in_the_checkout_alone(wheel):
    assert not [path for path in wheel if path.removeprefix("dma_diffusers/").startswith(RECIPES)]
    names = [f"dma_diffusers.{recipe.rstrip('/').replace('/', '.')}" for recipe in RECIPES]
    loaded = python(
        f"import sys, {', '.join(names)}; print(*(sys.modules[n].__file__ for n in {names}), sep='\\n')"
    )
    assert loaded.splitlines() == [str(ROOT / recipe / "__init__.py") for recipe in RECIPES]


def test_the_wheel_says_that_it_is_typed(wheel):
    assert "dma_diffusers/py.typed" in wheel


def test_every_demo_file_is_in_the_wheel(sources, wheel):
    demos = ("pipelines/demo/", "pipelines/demo_video/")
    expected = {f"dma_diffusers/{path}" for path in sources if path.startswith(demos)}
    assert {f"dma_diffusers/{demo}prompts.jsonl" for demo in demos} <= expected
    assert expected <= wheel


def test_every_template_is_in_the_wheel(sources, wheel):
    expected = {f"dma_diffusers/{path}" for path in sources if path.endswith(".jinja")}
    assert expected
    assert expected <= wheel


def heading_anchors(page: str) -> set[str]:
    """Returns the names that GitHub gives the page's headings in links."""
    headings = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_between_pages_lead_somewhere(sources):
    pages = {path: (ROOT / path).read_text() for path in sources if path.endswith(".md")}
    links = [(path, link) for path, page in pages.items() for link in re.findall(r"\]\(([^)\s]+)\)", page)]
    relative = [(path, *link.partition("#")[::2]) for path, link in links if "://" not in link]
    assert len(relative) > 50
    for path, target, anchor in relative:
        file = (ROOT / path).parent.joinpath(target).resolve() if target else ROOT / path
        led_to = file.relative_to(ROOT.resolve()).as_posix()
        assert led_to in sources, f"{path} links to {target}"
        assert not anchor or anchor in heading_anchors(pages[led_to]), f"{path} links to {target}#{anchor}"


def test_hugging_face_kernels_is_not_shadowed():
    pytest.importorskip("kernels")
    origin = python("import importlib.util; print(importlib.util.find_spec('kernels').origin)")
    assert "site-packages" in origin
    assert "FluxPipeline" in python("from diffusers import FluxPipeline; print(FluxPipeline.__name__)")


def test_the_package_imports_neither_torch_nor_diffusers():
    loaded = python("import dma_diffusers, sys; print(*sys.modules)").split()
    assert not {"torch", "diffusers"} & set(loaded)


def kernel_modules() -> list[str]:
    paths = sorted((ROOT / "kernels").rglob("*.py"))
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
    return [f"dma_diffusers.{name}".removesuffix(".__init__") for name in names]


def test_kernels_import_no_diffusers():
    imports = "; ".join(f"import {name}" for name in kernel_modules())
    loaded = python(f"{imports}; import sys; print(*sys.modules)").split()
    assert {"torch", "dma_diffusers.kernels.formats"} <= set(loaded)
    assert not {"diffusers", "transformers"} & set(loaded)


def test_the_command_line_starts_without_the_rooms():
    code = "import sys; from dma_diffusers.cli import main; print(*sys.modules)"
    assert not {"torch", "diffusers", "transformers", "PIL"} & set(python(code).split())
