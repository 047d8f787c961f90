"""Save tiny video pipelines like a user's model folders."""

import json
from pathlib import Path

from tests.tiny_pipelines import CALLS, cogvideox, wan, wan_from_image

STEPS = 2
PIPELINES = {"wan": wan, "wan from image": wan_from_image, "cogvideox": cogvideox}


def save_video(name: str, folder: Path) -> Path:
    """Save a pipeline and its `generation.json` into `folder`; returns the folder."""
    pipe = PIPELINES[name]()
    pipe.save_pretrained(folder)
    (folder / "generation.json").write_text(json.dumps(CALLS[type(pipe)] | {"num_inference_steps": STEPS}))
    return folder
