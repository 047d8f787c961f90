"""Groups of options: one parameter of a command, several options of the command line."""

import inspect
from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from dma_diffusers.cli import app
from dma_diffusers.cli.call import sides_of
from dma_diffusers.cli.console import seeds_from
from dma_diffusers.cli.options import flat
from tests.command_line import run


@dataclass(frozen=True)
class Size:
    width: Annotated[int, typer.Option(help="Pixels across.")]
    height: Annotated[int | None, typer.Option(min=1)] = None


def test_fields_of_a_group_are_options(capsys):
    called = []

    def draw(prompt: str, size: Size, steps: Annotated[int, typer.Option()] = 4) -> None:
        called.append((prompt, size, steps))

    single = typer.Typer()
    single.command()(flat(draw))
    assert CliRunner().invoke(single, ["a cat", "--width", "8", "--steps", "2"]).exit_code == 0
    assert called == [("a cat", Size(8), 2)]
    assert CliRunner().invoke(single, ["a cat"]).exit_code != 0  # --width is required
    assert CliRunner().invoke(single, ["a cat", "--width", "8", "--height", "0"]).exit_code != 0


@pytest.mark.parametrize(("first", "count"), [(2**64, 1), (2**63, 1), (2**63 - 3, 4), (-1, 1)])
def test_seeds_out_of_range_are_one_line(first, count):
    with pytest.raises(
        ValueError, match=f"--seed {first}: {count} seeds from there must be from 0 to {2**63 - 1}$"
    ):
        seeds_from(first, count)
    assert seeds_from(2**63 - 4, 4)[-1] == 2**63 - 1


def test_no_command_takes_more_than_twelve_arguments():
    groups = [group.typer_instance for group in app.registered_groups]
    commands = [each.callback for typers in (app, *groups) for each in typers.registered_commands]
    taken = {
        command.__name__: len(inspect.signature(inspect.unwrap(command)).parameters) for command in commands
    }
    assert len(taken) == 16 and max(taken.values()) <= 12


@pytest.mark.parametrize("command", [
    ("generate", "a cat", "-o", "out.png"), ("generate-video", "a cat", "-o", "out.mp4"),
    ("batch", "jobs.jsonl", "-o", "out"),
])  # fmt: skip
@pytest.mark.parametrize("words", ["int8/", "int8/bf16/bf16", "int8/fp3"])
def test_words_that_are_no_precision_are_refused_in_one_line(monkeypatch, capsys, tmp_path, command, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jobs.jsonl").write_text('{"prompt": "a cat"}\n')
    code, output, error = run(monkeypatch, capsys, *command, "--low", words)
    assert (code, output, error.count("\n")) == (1, "", 1)
    assert words in error or "fp3" in error
    assert "mxfp4" in error
    assert not [path for path in tmp_path.iterdir() if path.name != "jobs.jsonl"]


def test_a_size_is_a_square_or_width_and_height():
    assert sides_of(None) == {} and sides_of("64") == {"width": 64, "height": 64}
    assert sides_of("832x480") == sides_of("832×480") == {"width": 832, "height": 480}
    for text in ("0", "9x170x140", "big", "64x", "-1"):
        with pytest.raises(ValueError, match=f"--size.*{text}") as error:
            sides_of(text)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("command", ["generate", "generate-video", "batch", "eval", "calibrate"])
def test_every_command_that_draws_takes_the_same_words(command):
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "300", "NO_COLOR": "1"}).output
    for option in (
        "--size",
        "--guidance-scale",
        "--true-cfg-scale",
        "--max-sequence-length",
        "--negative-prompt",
    ):
        assert option in shown, option
