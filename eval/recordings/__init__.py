"""Real q, k and v of a pipeline's attention are recorded once, and measured and calibrated on without drawing again."""
