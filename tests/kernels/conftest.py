import os

import pytest
import torch

from dma_diffusers.kernels.quantiser import reference as quantiser

INTERPRETED = "a GPU, or Triton's interpreter (TRITON_INTERPRET=1, Triton 3.8 or newer)"


def _interpreter_has_dot_scaled() -> bool:
    import triton

    return tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)


@pytest.fixture(autouse=os.environ.get("TRITON_INTERPRET") == "1")
def patched_once(monkeypatch):
    """The interpreter patches the language anew for every call of a function, a third of its time: once will do."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    patch, patched = interpreter._patch_lang, set()

    def patch_once(function):
        """Patch what the function's module sees of the language, until the kernel that is running has ended."""
        module = id(function.__globals__)
        if module in patched:
            return interpreter._LangPatchScope()  # with nothing to restore
        scope = patch(function)
        if not patched:
            restore = scope.restore
            scope.restore = lambda: (patched.clear(), restore())
        patched.add(module)
        return scope

    monkeypatch.setattr(interpreter, "_patch_lang", patch_once)


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
def unrounded(monkeypatch):
    """The reference rounds no probability: its log-sum-exp tells to the last digits which scores it saw."""
    monkeypatch.setattr(quantiser, "rounded_p", lambda p, pv: p)


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
