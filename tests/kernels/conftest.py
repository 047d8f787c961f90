import pytest
import torch

INTERPRETED = "a GPU, or Triton's interpreter (TRITON_INTERPRET=1, Triton 3.8 or newer)"


def _interpreter_has_dot_scaled() -> bool:
    import triton

    return tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)


@pytest.fixture
def kernel_device() -> torch.device:
    """Where Triton kernels can run now: the interpreter's CPU, or a GPU."""
    triton = pytest.importorskip("triton")
    if triton.knobs.runtime.interpret and _interpreter_has_dot_scaled():
        return torch.device("cpu")
    if not triton.knobs.runtime.interpret and torch.cuda.is_available():
        return torch.device("cuda")
    pytest.skip(f"needs {INTERPRETED}")


@pytest.fixture
def poisoned(monkeypatch):
    """`torch.empty` full of NaN (bytes: 0xFF, which is NaN in e4m3 and E8M0; int8: −128; other integers: −1).

    What isn't written shows.
    """
    poison = {torch.uint8: 0xFF, torch.int8: -128, torch.int16: -1, torch.int32: -1}

    def poisoned(empty):
        def allocate(*args, **kwargs):
            x = empty(*args, **kwargs)
            return x.fill_(poison.get(x.dtype, torch.nan))

        return allocate

    for name in ("empty", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
