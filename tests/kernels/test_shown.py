"""The table of kernels/README.md that says how each pair of formats was shown on each architecture."""

from itertools import product
from pathlib import Path

import pytest

pytest.importorskip("triton")

from dma_diffusers.kernels import lowerings, shown
from dma_diffusers.kernels.defaults import FORMAT_PAIRS
from dma_diffusers.kernels.precision import Precisions
from tests.kernels.calls import GRID_CALLS, NAMED_CALLS, random_calls

ROOT = Path(shown.__file__).parents[1]
CELLS = list(product(lowerings.KERNEL_ARCHITECTURES, shown.PAIRS))


def test_the_page_has_the_table():
    page = (ROOT / "kernels/README.md").read_text()
    table = page.split("<!-- shown -->\n")[1].split("<!-- /shown -->")[0]
    assert table == shown.markdown()


@pytest.mark.parametrize(("architecture", "pair"), CELLS)
def test_a_cell_says_what_the_lowerings_do(architecture, pair):
    found = shown.shown(architecture, *pair)
    chosen = lowerings.choose(architecture, 128, *pair)
    how, _, rest = found.partition(" ")
    assert how in ("run", "compiled", "interpreted", "refused:")
    assert (how == "refused:") == (chosen.lowering == "reference")
    assert rest == f"({chosen.lowering})" or rest in chosen.reason
    if how == "compiled":
        assert pair in FORMAT_PAIRS[architecture]
    if how == "run":
        assert architecture == "sm_90", "no other GPU ran the tests"


def test_every_pair_of_an_architecture_is_a_row():
    assert {pair for pairs in FORMAT_PAIRS.values() for pair in pairs} <= set(shown.PAIRS)


def test_what_is_interpreted_or_run_is_among_the_calls_of_the_tests():
    """Each precision of each pair: of both classes, tests run several with any other."""
    calls = (*NAMED_CALLS, *GRID_CALLS, *random_calls(24))
    tested = {str(x) for call in calls for x in Precisions.parse(call.high, call.low)}
    asked = {str(x) for pair in shown.PAIRS for x in Precisions.parse(*pair)}
    assert asked - tested == {"nvfp4/fp8"}  # which `test_nvfp4` has to itself
