"""Save the tiny FLUX pipeline like a user's model folder."""

import json
from pathlib import Path

from tests.tiny_pipelines import flux

CALL = {"height": 48, "width": 40, "num_inference_steps": 2, "max_sequence_length": 19, "guidance_scale": 1.0}


def save_flux(folder: Path) -> Path:
    """Save the pipeline and its `generation.json` into `folder`; returns the folder."""
    flux().save_pretrained(folder)
    (folder / "generation.json").write_text(json.dumps(CALL))
    return folder
