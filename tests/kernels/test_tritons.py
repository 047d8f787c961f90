"""The versions of Triton that the kernels were tested with, and the warning for others."""

import re
import warnings
from pathlib import Path

import pytest
import torch

from dma_diffusers.kernels.device import launch, tritons
from dma_diffusers.kernels.device.tritons import NEWEST_TESTED, OLDEST_TESTED, warn_of_untested


@pytest.mark.parametrize("triton", [(2, 9), (3, 5), (3, 10), (4, 0)])
def test_an_untested_triton_is_warned_of_once_with_both_numbers(triton):
    warn_of_untested.cache_clear()
    given = ".".join(map(str, triton))
    with pytest.warns(
        UserWarning, match=rf"tested with Triton 3\.6 to 3\.9, and this is Triton {given}:"
    ) as caught:
        warn_of_untested(triton)
        warn_of_untested(triton)
    assert len(caught) == 1


@pytest.mark.parametrize("triton", [OLDEST_TESTED, (3, 8), NEWEST_TESTED])
def test_a_tested_triton_is_not_warned_of(triton):
    warn_of_untested.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_untested(triton)


def test_every_launch_would_warn(monkeypatch):
    warned = []
    monkeypatch.setattr(launch, "warn_of_untested", lambda: warned.append(True))
    kernel = {(1,): lambda *arguments, **options: "compiled"}
    assert launch.run(kernel, (1,), torch.zeros(1)) == "compiled"
    assert warned


def test_the_page_and_the_requirements_name_these_versions():
    root = Path(tritons.__file__).parents[2]
    page = (root / "kernels" / "tritons.md").read_text()
    rows = re.findall(r"^\| (\d+)\.(\d+)\.", page, flags=re.MULTILINE)
    assert tuple(tuple(map(int, row)) for row in (rows[0], rows[-1])) == (OLDEST_TESTED, NEWEST_TESTED)
    oldest = ".".join(map(str, OLDEST_TESTED))
    assert f'"triton>={oldest};' in (root / "pyproject.toml").read_text()
