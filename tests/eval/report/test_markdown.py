"""The Markdown table: the evaluation's numbers, and nothing that Markdown would take for its own."""

import pytest

from dma_diffusers.eval.report.markdown import table

_N = {"n": 800}


@pytest.fixture
def small():
    return {
        "command": "dma-diffusers eval",
        "created": "2026-11-21T20:00:00Z",
        "settings": {"model": "demo", "prompts": 0, "seeds": 4},
        "versions": {},
        "hardware": "CPU",
        "sources": {},
        "prompts": [],
        "notes": [],
        "metrics": {
            "psnr_db": {"title": "PSNR, dB", "better": "higher", "digits": 2},
            "kid": {"title": "KID", "better": "lower", "digits": 3},
            "flicker": {"title": "Flicker", "better": "lower", "digits": 3},
        },
        "rows": {
            "full precision": {
                "role": "baseline",
                "seconds_per_picture": 12.3456,
                "summary": {"psnr_db": {"estimate": None, "low": None, "high": None} | _N},
            },
            "noise floor": {
                "role": "noise floor",
                "seconds_per_picture": None,
                "summary": {"psnr_db": {"estimate": None, "low": 51.5, "high": None} | _N},
            },
            "low=int8_tile|<b>": {
                "role": "configuration",
                "seconds_per_picture": 123.456,
                "summary": {
                    "psnr_db": {"estimate": 33.333, "low": 32.001, "high": 34.999} | _N,
                    "kid": {"estimate": -0.00061, "low": None, "high": None, "n": 700},
                },
            },
        },
    }


def test_table(small):
    assert table(small).splitlines() == [
        "| Attention | PSNR, dB ↑ | KID ↓ | Seconds per picture |",
        "| --- | ---: | ---: | ---: |",
        "| **full precision (baseline)** | ∞ | – | 12.3 |",
        "| **noise floor** | ∞ [51.50, ∞] | – | – |",
        r"| low=int8\_tile\|\<b\> | 33.33 [32.00, 35.00] | −0.001 | 123 |",
        "| n | 800 | 700 |  |",
    ]


def test_counts_that_differ_are_in_the_cells(small):
    small["rows"]["noise floor"]["summary"]["kid"] = {"estimate": 0.5, "low": 0.4, "high": 0.6, "n": 600}
    lines = table(small).splitlines()
    assert lines[3] == "| **noise floor** | ∞ [51.50, ∞] | 0.500 [0.400, 0.600] (n = 600) | – |"
    assert "| −0.001 (n = 700) |" in lines[4]
    assert lines[5] == "| n | 800 |  |  |"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.05, "0.0500"), (0.9996, "1.00"), (999.4, "999"), (999.6, "1000"), (4321.9, "4322")],
)
def test_seconds_need_no_exponent(small, seconds, text):
    small["rows"]["noise floor"]["seconds_per_picture"] = seconds
    assert table(small).splitlines()[3].endswith(f" {text} |")


def test_identical_pictures_are_counted_beside_the_mean_of_the_others(small):
    small["rows"]["low=int8_tile|<b>"]["summary"]["psnr_db"]["identical"] = 3
    small["rows"]["full precision"]["summary"]["psnr_db"]["identical"] = 800
    _, _, exact, _, low, _ = table(small).splitlines()
    assert "| 33.33 [32.00, 35.00] (3 identical) |" in low and "| ∞ |" in exact


def test_rows_say_what_ran(small):
    row = small["rows"].pop("low=int8_tile|<b>")
    modules = [{"module": "transformer.a.attn", "lowering": "reference"}]
    small["rows"] |= {"all": row | {"ran": 1}, "some": row | {"ran": 0.25}, "none": row | {"ran": 0}}
    small["rows"]["slow"] = row | {"receipt": {"modules": modules}}
    every, some, none, slow = table(small).splitlines()[4:-1]
    assert every.startswith("| all |") and every.endswith("| 123 |")
    assert some.startswith("| some (25% of the calls ran at low precision) |")
    assert none.startswith("| none (no call ran at low precision) |")
    assert slow.startswith("| slow |") and slow.endswith("| 123 (reference) |")
