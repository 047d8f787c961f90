"""Each picture and each row has a verdict: the same picture as full precision's, the same scene, or another one."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from dma_diffusers.eval.report.evaluation import BASELINE, NOISE_FLOOR, noun, number

SAME, SCENE, DIVERGED = "same", "same scene", "diverged"
# LPIPS up to which a picture counts as the same, and as the same scene. Caching of video models is published as nearly
# lossless at LPIPS .08 to .13 (the slow settings of MagCache and TeaCache on Open-Sora), with VBench's score unchanged;
# at .19 to .32 (other slow and the fast settings of TeaCache) details change, and VBench loses up to .8 points; at .39
# and .55 (PAB on Latte and Open-Sora-Plan) it loses 4 and 9: table 1 of arXiv 2411.19108 and of 2506.09045. The cards
# of FLUX fine-tunes in 4 bits by SVDQuant give .19 to .32, too.
LIMITS = {SAME: 0.10, SCENE: 0.35}
SHARE = 0.95
METRIC = "lpips"


def verdicts(evaluation: dict[str, Any], name: str) -> list[str]:
    """Return the verdict of each picture or clip of a row; nothing where a row has no LPIPS or is full precision.

    A picture that differs no more than the noise floor's does of the same prompt and seed counts as the same: another
    exact kernel changes it as much.
    """
    row = evaluation["rows"][name]
    scores = row.get("pictures", {}).get(METRIC)
    if not scores or row["role"] == BASELINE or is_idle(row):
        return []
    floors = _floors(evaluation, len(scores))
    return [_verdict(number(score), floor) for score, floor in zip(scores, floors, strict=True)]


def is_idle(row: dict[str, Any]) -> bool:
    """Say if nothing of a row ran at low precision: no attention call, and no linear layers beside them."""
    return row.get("ran") == 0 and not (row.get("config") or {}).get("linears")


def of_row(found: Sequence[str]) -> str | None:
    """Return the verdict that 19 of 20 pictures have or better; None for no pictures."""
    if not found:
        return None
    counts = Counter(found)
    needed = math.ceil(SHARE * len(found))
    if counts[SAME] >= needed:
        return SAME
    return SCENE if counts[SAME] + counts[SCENE] >= needed else DIVERGED


def words(verdict: str, evaluation: dict[str, Any]) -> str:
    """Return a verdict as a reader sees it, such as "same picture"."""
    return f"same {noun(evaluation)}" if verdict == SAME else verdict


def counted(found: Sequence[str]) -> str:
    """Write how many pictures have each verdict, such as "396 same, 4 same scene"."""
    counts = Counter(found)
    return ", ".join(f"{counts[verdict]} {verdict}" for verdict in (SAME, SCENE, DIVERGED) if counts[verdict])


def of_sample(evaluation: dict[str, Any], name: str, prompt: int, seed: int) -> str | None:
    """Return the verdict of one picture, by its prompt's place and its seed; None where the row has none."""
    found = verdicts(evaluation, name)
    seeds = evaluation["settings"]["seeds"]
    place = seed - evaluation["settings"].get("seed", 0)
    return words(found[prompt * seeds + place], evaluation) if found and 0 <= place < seeds else None


def _verdict(score: float, floor: float) -> str:
    if score <= max(LIMITS[SAME], floor):
        return SAME
    return SCENE if score <= LIMITS[SCENE] else DIVERGED


def _floors(evaluation: dict[str, Any], count: int) -> list[float]:
    """Return the noise floor's LPIPS of each picture, 0 where it has none."""
    rows = evaluation["rows"].values()
    floor = next((row for row in rows if row["role"] == NOISE_FLOOR), {})
    scores = floor.get("pictures", {}).get(METRIC)
    return [number(score) for score in scores] if scores else [0.0] * count
