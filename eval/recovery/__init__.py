"""How much of what low precision loses comes back when the demo models are fine-tuned for it."""
