"""`bench parallel` over two processes: on the CPU with gloo at a small size, on two GPUs with our kernels."""

import json
import os
import socket
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from dma_diffusers.eval.bench import parallel
from dma_diffusers.eval.bench.parallel import (
    CUDNN,
    EXCHANGE,
    LOW,
    MAPPED,
    ONE,
    RING,
    ULYSSES,
    WIRE,
    WIRE_8_BIT,
)
from dma_diffusers.eval.bench.shapes import Shape
from tests.command_line import run

SMALL, LARGE = Shape("", 1, 2, 512, 32), Shape("", 1, 8, 8192, 128)


def _process(rank: int, port: int, device_type: str, shape: Shape, lowering: str, folder: str) -> None:
    os.environ.update(
        MASTER_ADDR="localhost", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2"
    )
    torch.set_num_threads(1)
    with parallel.processes(device_type) as device, torch.no_grad():
        measured = parallel.bench_parallel(shape, device, rounds=1, calls=1, lowering=lowering)
    threads = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
    assert "pt_gloo_runloop" not in threads, (
        "a thread that is still there when the interpreter ends may abort it"
    )
    Path(folder, str(rank)).write_text(json.dumps(measured))


def measured_by(device_type: str, shape: Shape, lowering: str) -> dict:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_process, (port, device_type, shape, lowering, folder), nprocs=2)
        first, second = (json.loads(Path(folder, str(rank)).read_text()) for rank in range(2))
    assert first == second
    return first


def assert_agrees(measured: dict, exact: float) -> None:
    """Two are one, but for what rounding makes of tiles in another order, or of other tiles."""
    errors = {(entry["name"], entry["on"]): entry.get("relative_l2") for entry in measured["entries"]}
    assert list(errors) == [
        (CUDNN, ONE), (LOW, ONE), (MAPPED, ONE), (CUDNN, ULYSSES), (LOW, ULYSSES), (LOW, RING), (MAPPED, ULYSSES),
        (MAPPED, RING), (EXCHANGE, ULYSSES), (EXCHANGE, RING), (WIRE, ULYSSES), (WIRE_8_BIT, ULYSSES),
    ]  # fmt: skip
    assert all(errors[name, ULYSSES] <= exact for name in (CUDNN, LOW, MAPPED))
    assert 0 < errors[LOW, RING] < 0.06 and 0 < errors[MAPPED, RING] < 0.06


def test_two_processes_compute_what_one_does():
    measured = measured_by("cpu", SMALL, "reference")
    assert_agrees(measured, exact=1e-3)
    lines = parallel.cells(measured)
    assert {len(line) for line in lines} == {len(parallel.HEADER)} and lines[0][3:5] == ("1.00", "1.00")
    assert all(entry["ms"] > 0 for entry in measured["entries"])
    assert measured["communication"]["share_of_ulysses"].keys() == {LOW, MAPPED}


@pytest.mark.kernel
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_compute_what_one_does():
    assert_agrees(measured_by("cuda", LARGE, "auto"), exact=1e-3)


def test_it_says_how_to_start_it(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setitem(sys.modules, "triton", sys)
    code, _, error = run(monkeypatch, capsys, "bench", "parallel")
    assert code == 1 and parallel.HOW_TO_START in error
