"""A paragraph says in words what an evaluation's table says in numbers."""

from typing import Any

from dma_diffusers.eval.report.columns import cost_text
from dma_diffusers.eval.report.evaluation import CONFIGURATION, NOISE_FLOOR, noun, number
from dma_diffusers.eval.report.verdicts import (
    DIVERGED,
    METRIC,
    SAME,
    SCENE,
    counted,
    is_idle,
    of_row,
    verdicts,
)


def in_words(evaluation: dict[str, Any]) -> str:
    """Say which configurations keep the pictures, which is nearest, and which is cheapest; empty without LPIPS."""
    rows = {name: row for name, row in evaluation["rows"].items() if row["role"] == CONFIGURATION}
    found = {name: verdicts(evaluation, name) for name in rows}
    judged = {name: of_row(of_pictures) for name, of_pictures in found.items() if of_pictures}
    if not judged:
        return ""
    thing = noun(evaluation)
    count = min(len(found[name]) for name in judged)
    share = f"At least 19 of 20 {thing}s" if count >= 20 else f"All {count} {thing}s"
    said = {
        SAME: f"{share} are the same to the eye as full precision's with",
        SCENE: "The scene stays while details change with",
        DIVERGED: f"More than 1 of 20 {thing}s shows something else than full precision's with",
    }
    sentences = []
    for verdict, what in said.items():
        names = [name for name in judged if judged[name] == verdict]
        if names:
            listed = "; ".join(f"{name} ({counted(found[name])})" for name in names)
            sentences.append(f"{what} {len(names)} of {len(rows)} configurations: {listed}.")
    if idle := [name for name, row in rows.items() if is_idle(row)]:
        sentences.append(f"Nothing of {'; '.join(idle)} ran at low precision, so there is nothing to judge.")
    few = [f"So few {thing}s are a first look."] if count < 20 else []
    return " ".join([*sentences, *_nearest(evaluation, judged), *_cheapest(evaluation, judged), *few])


def _nearest(evaluation: dict[str, Any], judged: dict[str, Any]) -> list[str]:
    """Say which configuration is nearest to full precision, beside the noise floor."""
    scores = {name: _score(evaluation["rows"][name]) for name in judged}
    name = min(scores, key=scores.__getitem__)
    sentence = f"Nearest is {name}, with a mean LPIPS of {scores[name]:.2g}"
    rows = evaluation["rows"].values()
    floors = [_score(row) for row in rows if row["role"] == NOISE_FLOOR and METRIC in row["summary"]]
    if any(floors):
        sentence += f"; another exact kernel alone makes {floors[0]:.2g}, and less than that means nothing"
    return [f"{sentence}."]


def _cheapest(evaluation: dict[str, Any], judged: dict[str, Any]) -> list[str]:
    """Say which configuration that keeps the pictures has the least predicted cost."""
    rows = evaluation["rows"]
    costs = {
        name: rows[name]["predicted_cost"]
        for name, verdict in judged.items()
        if verdict == SAME and rows[name].get("predicted_cost") is not None
    }
    if not costs:
        return []
    name = min(costs, key=costs.__getitem__)
    return [
        f"The cheapest that keeps the {noun(evaluation)}s is {name}, whose attention is predicted to cost "
        f"{cost_text(rows[name])} of bf16's on {evaluation['settings'].get('target', 'the target')}."
    ]


def _score(row: dict[str, Any]) -> float:
    return number(row["summary"][METRIC]["estimate"])
