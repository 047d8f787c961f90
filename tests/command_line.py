"""The command line, in this process or in one of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dma_diffusers.cli import main

ROOT = Path(__file__).parents[1]


def start(*arguments: str, **environment: str) -> subprocess.Popen:
    """The command line in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "dma_diffusers", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of the command line, in this process."""
    monkeypatch.setattr(sys, "argv", ["dma-diffusers", *arguments])
    monkeypatch.delenv("FORCE_COLOR", raising=False)  # it shows bars, on standard error
    with pytest.raises(SystemExit) as ended:
        main()
    output, error = capsys.readouterr()
    return ended.value.code or 0, output, error
