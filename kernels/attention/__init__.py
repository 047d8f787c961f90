"""The attention call: a torch reference that defines what is correct, and the fused kernel beside it."""
