"""Scorers for `dma-diffusers eval --scorer`, and examples for scorers of one's own."""
