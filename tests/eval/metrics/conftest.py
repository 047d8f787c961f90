from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

SHEET = Path(__file__).parents[3] / "pipelines/demo/contact_sheet.webp"


@pytest.fixture(scope="session")
def demo_pictures():
    """Sixteen pictures of the demo model, [16, 3, 176, 176] uint8."""
    with Image.open(SHEET) as sheet:
        pixels = np.array(sheet.convert("RGB"))
    corners = [(8 + 230 * (i // 8), 8 + 184 * (i % 8)) for i in range(16)]
    cells = np.stack([pixels[y : y + 176, x : x + 176] for y, x in corners])
    return torch.from_numpy(cells).permute(0, 3, 1, 2)


@pytest.fixture(scope="session")
def noisy(demo_pictures):
    """The demo pictures under noise of a given standard deviation, [16, 3, 176, 176] uint8."""

    def draw(strength: float) -> torch.Tensor:
        noise = torch.randn(demo_pictures.shape, generator=torch.Generator().manual_seed(0))
        return (demo_pictures + strength * noise).round().clamp(0, 255).byte()

    return draw
