"""Pictures beside MicroMix's: paired differences, whose interval is that of prompts drawn together."""

import numpy as np
import pytest

from dma_diffusers.eval.linears.pictures import difference, table


def evaluation(shift: float, noise: float = 0.0) -> dict:
    """Twenty prompts with two seeds each, which vary much more than MicroMix and the other row differ."""
    random = np.random.default_rng(0)
    ours = random.normal(25, 5, (20, 2))
    others = ours + shift + noise * random.normal(size=(20, 2))

    def row(role: str, psnr: np.ndarray) -> dict:
        metrics = {"psnr_db": psnr, "lpips": 1 / psnr}
        return {
            "role": role,
            "pictures": {name: values.flatten().tolist() for name, values in metrics.items()},
            "summary": {
                name: {"estimate": values.mean(), "low": values.min(), "high": values.max(), "n": 40}
                for name, values in metrics.items()
            },
        }

    rows = {
        "full precision": row("baseline", ours), "noise floor": row("noise floor", ours + 30),
        "micromix": row("configuration", ours), "random": row("configuration", others),
    }  # fmt: skip
    return {"settings": {"seeds": 2}, "rows": rows}


def test_a_difference_has_no_more_spread_than_its_own():
    assert difference(evaluation(-1.5), "psnr_db", "random") == pytest.approx((-1.5, -1.5, -1.5))
    spread = difference(evaluation(-1.5, noise=0.1), "psnr_db", "random")
    assert spread.low < -1.5 + 0.05 and spread.high > -1.5 - 0.05 and 0.01 < spread.high - spread.low < 0.2
    assert difference(evaluation(-1.5), "lpips", "random").low > 0


def test_identical_pictures_are_infinitely_near():
    contents = evaluation(-1.5)
    floor = contents["rows"]["noise floor"]
    floor["pictures"]["psnr_db"], floor["summary"]["psnr_db"] = [None] * 40, {"estimate": None, "n": 40}
    assert "| noise floor | ∞ | ∞ |" in table(contents)


def test_the_table_has_each_row_but_full_precision():
    lines = table(evaluation(-1.5)).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| noise floor", "| micromix", "| random"]
    assert "| −1.50 [−1.50, −1.50] |" in lines[-1] and lines[-2].count("| –") == 2
    assert {line.count("|") for line in lines} == {6}
