"""This room measures quality and speed, and predicts what low-precision attention costs and brings."""
