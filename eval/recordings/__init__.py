"""Real q, k and v of a pipeline's attention: recorded once, measured and calibrated on without drawing again."""
