"""Precision routed by content: which LOW pairs of tiles a call's own q, k and v make HIGH."""
