"""How an attention call is cut into tiles: its tokens, their order, and the precision of every pair of tiles."""
