"""Tiling cuts an attention call into tiles of tokens, and chooses the precision of every pair of tiles."""
