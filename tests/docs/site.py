"""Functions here give the site's hook and pages, and build it strictly."""

import importlib.util
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
MISSING = "the site needs mkdocs-material and mkdocstrings-python: pip install -e '.[docs]'"


@cache
def hook() -> ModuleType:
    """Return the module `docs/pages.py`, which MkDocs calls."""
    assert importlib.util.find_spec("material") and importlib.util.find_spec("mkdocstrings_handlers"), MISSING
    spec = importlib.util.spec_from_file_location("docs_pages", ROOT / "docs" / "pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def pages() -> tuple[str, ...]:
    """Return the markdown files that the site shows, and README.md, relative to the root."""
    from mkdocs.config import load_config

    navigation = hook().in_navigation(load_config(str(ROOT / "mkdocs.yml")).nav)
    reached = hook().Repository(ROOT).reached(navigation)
    return ("README.md", *sorted(path for path in reached if path.endswith(".md")))


def build(folder: Path, config: Path = ROOT / "mkdocs.yml") -> subprocess.CompletedProcess:
    """Build the site strictly into a folder, in a process that a proxy keeps from every network."""
    nowhere = "http://127.0.0.1:9"
    environment = {name: nowhere for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]  # with --quiet it would count no warning
    return subprocess.run(
        [*command, "--config-file", config, "--site-dir", folder],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
