"""Linear layers: their bits over noise levels, their errors, and comparisons of ways to choose their bits."""
