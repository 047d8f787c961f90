"""Guards of the code's shape: how long files and signatures are, and which way imports point."""

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

from dma_diffusers.cli import app

ROOT = Path(__file__).parents[1]
MOST_LINES, MOST_PARAMETERS = 500, 12
# A room may import itself and the rooms before it.
ROOMS = ("kernels", "dma_diffusers", "pipelines", "eval")
ROOMS_OF_KERNELS = (
    "formats", "precision", "lowerings", "defaults", "tiling", "device", "call", "quantiser", "linears",
    "training", "routing", "plan", "plan_cache", "attention", "backward", "checks", "operator", "ahead_of_time",
    "page",
)  # fmt: skip
# Kernels and the registered operator take the flat arguments that Triton and torch need.
KERNEL = re.compile(r"\bjit\b")
OPERATOR = {("dma_diffusers.kernels.operator", name) for name in ("attention", "_attention", "_fake")}

FILES = {
    path.relative_to(ROOT): path.read_text()
    for folder in (*ROOMS, "tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
}


def module_name(path: Path) -> str:
    """The name under which the file at `path`, relative to the root, is imported."""
    name = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
    return name if path.parts[0] == "dma_diffusers" else f"dma_diffusers.{name}"


MODULES = {module_name(path): ast.parse(text) for path, text in FILES.items() if path.parts[0] in ROOMS}


def imported(tree: ast.AST, when_run: bool) -> Iterator[str]:
    """The modules above that `tree` imports, those within functions only where `when_run`."""
    for node in ast.iter_child_nodes(tree):
        match node:
            case ast.Import(names=aliases):
                yield from (alias.name for alias in aliases if alias.name in MODULES)
            case ast.ImportFrom(module=str(module), names=aliases, level=0):
                names = {f"{module}.{alias.name}" for alias in aliases}
                yield from names & MODULES.keys() or {module} & MODULES.keys()
            case ast.FunctionDef() | ast.AsyncFunctionDef() if not when_run:
                pass
            case ast.If(test=test) if "TYPE_CHECKING" in ast.unparse(test) and not when_run:
                pass
            case _:
                yield from imported(node, when_run)


def room(module: str) -> str:
    """The one of ROOMS that `module` is in."""
    _, *inner = module.split(".")
    return inner[0] if inner and inner[0] in ROOMS else "dma_diffusers"


def commands() -> set[tuple[str, str]]:
    """Module and name of each command's function, whose parameters are the command's options."""
    groups = [app, *(group.typer_instance for group in app.registered_groups)]
    functions = [command.callback for group in groups for command in group.registered_commands]
    return {(function.__module__, function.__name__) for function in functions}


def test_no_file_is_long():
    lengths = {str(path): len(text.splitlines()) for path, text in FILES.items()}
    assert len(lengths) > 200
    long = {path: length for path, length in lengths.items() if length > MOST_LINES}
    assert not long, long


def test_no_plain_function_takes_many_parameters():
    exempt = commands() | OPERATOR
    long = {}
    for path, text in FILES.items():
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            is_kernel = any(KERNEL.search(ast.unparse(decorator)) for decorator in node.decorator_list)
            parameters = sum(isinstance(part, ast.arg) for part in ast.iter_child_nodes(node.args))
            if (
                parameters > MOST_PARAMETERS
                and not is_kernel
                and (module_name(path), node.name) not in exempt
            ):
                long[f"{path}: {node.name}"] = parameters
    assert not long, long


def test_no_imports_go_in_a_circle():
    graph = {name: set(imported(tree, when_run=False)) - {name} for name, tree in MODULES.items()}
    assert sum(map(len, graph.values())) > 200
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_rooms_import_those_before_them():
    """Commands alone import the rooms above them, when they are run."""
    upward = [
        f"{importer} imports {name}"
        for importer, tree in MODULES.items()
        for name in imported(tree, when_run=not importer.startswith("dma_diffusers.cli."))
        if ROOMS.index(room(name)) > ROOMS.index(room(importer))
    ]
    assert not upward, upward


def test_rooms_of_kernels_import_those_before_them():
    places = {name: ROOMS_OF_KERNELS.index(name.split(".")[2]) for name in MODULES if room(name) == "kernels"}
    upward = [
        f"{importer} imports {name}"
        for importer, place in places.items()
        for name in imported(MODULES[importer], when_run=True)
        if places.get(name, place) > place
    ]
    assert not upward, upward
