"""This package trains the heads of the alignment score and measures them."""
