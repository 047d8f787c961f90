"""From the model's q, k, v to what the attention kernel multiplies."""
