"""Low-bit linear layers: channels in groups of one format each, weights and inputs in them, and their products."""
