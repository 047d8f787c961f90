"""Routing: each call upgrades its most important LOW pairs of tiles to HIGH, as its own q, k and v show them."""
