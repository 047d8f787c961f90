"""Quality, speed and predictions: what low-precision attention costs and what it brings."""
