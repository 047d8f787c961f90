"""Fine-tuning of a pipeline's transformer for the precision that it will run at."""
