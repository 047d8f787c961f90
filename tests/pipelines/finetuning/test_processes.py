"""Fine-tuning over two processes, in gloo on the CPU: it is that of one process with batches of twice the size."""

import gc
import json
import os
import shutil
import socket
from dataclasses import replace

import pytest
import torch
import torch.multiprocessing as mp
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers import FluxTransformer2DModel

from dma_diffusers.pipelines.finetuning.finetune import Watch, finetune
from dma_diffusers.pipelines.finetuning.order import Order
from dma_diffusers.pipelines.finetuning.request import Request
from dma_diffusers.pipelines.finetuning.trainer import Settings
from tests.pipelines.saved_flux import CALL, save_flux

SETTINGS = Settings(batch=1, learning_rate=1e-3, warmup=0)


def silent(title: str, done: int, total: int) -> None:
    pass


def _runs(request, folder) -> None:
    """Three steps, and the last of them once more, as if the run had been stopped after the second."""
    finetune(request, 3, folder / "whole", Watch(checkpoint_every=2), silent)
    if PartialState().is_main_process:
        shutil.copytree(folder / "whole", folder / "stopped")
        shutil.rmtree(folder / "stopped/checkpoints/step-00000003")
    PartialState().wait_for_everyone()
    # A process that is started anew would have any state.
    torch.manual_seed(99 + PartialState().process_index)
    finetune(request, 3, folder / "stopped", Watch(checkpoint_every=2), silent)


def _process(rank: int, port: int, request: Request, folder) -> None:
    os.environ.update(
        MASTER_ADDR="localhost", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
        ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    torch.set_num_threads(1)
    Accelerator.end_training = lambda self: None  # it ends the group, and another training follows here
    _runs(request, folder)
    torch.distributed.destroy_process_group()
    gc.collect()  # as `eval.bench.parallel.processes` does, and for its reason


def state_of(folder) -> dict:
    return torch.load(folder / "checkpoints/step-00000003/state.pt", weights_only=True)


def losses_of(folder) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "loss.jsonl").read_text().splitlines()]


def flat(weights: dict) -> torch.Tensor:
    return torch.cat([weights[name].detach().flatten() for name in sorted(weights)])


def test_two_processes_learn_what_one_does_and_go_on_bit_for_bit(tmp_path, monkeypatch):
    """Each process has half of the examples of a step; its number of steps is that of one process."""
    request = Request(
        save_flux(tmp_path / "model"), CALL, ("a cat", "a dog"), linears="qat", settings=SETTINGS
    )
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    mp.get_context("forkserver").set_forkserver_preload([__name__])  # one import serves both processes
    mp.start_processes(_process, (port, request, tmp_path), nprocs=2, start_method="forkserver")
    whole, stopped = (state_of(tmp_path / name) for name in ("whole", "stopped"))
    assert len(whole["random"]) == 2
    torch.testing.assert_close(whole, stopped, rtol=0, atol=0)

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    # A batch of one process has what the two had between them.
    one_by_one = Order.__getitem__
    halves = Order([0.0] * 4, 1, SETTINGS.seed)
    monkeypatch.setattr(
        Order, "__getitem__", lambda self, i: [*one_by_one(halves, 2 * i), *one_by_one(halves, 2 * i + 1)]
    )
    finetune(replace(request, settings=replace(SETTINGS, batch=2)), 3, tmp_path / "one", Watch(3), silent)
    assert losses_of(tmp_path / "one") == pytest.approx(losses_of(tmp_path / "whole"), rel=5e-3)
    # AdamW makes steps of one size of gradients that are nearly zero, whichever sign rounding gives them.
    start = flat(
        dict(FluxTransformer2DModel.from_pretrained(request.model / "transformer").named_parameters())
    )
    alone, both = flat(state_of(tmp_path / "one")["weights"]), flat(whole["weights"])
    assert (both - alone).norm() < 0.1 * (alone - start).norm()
    with pytest.raises(ValueError, match="is of 2 processes, not of 1: start as many"):
        finetune(request, 4, tmp_path / "whole", Watch(), silent)
