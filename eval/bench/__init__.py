"""This package measures speed: attention beside its peers, in one run on one GPU, under the bound of the hardware."""
