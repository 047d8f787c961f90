"""The arguments that the examples have in common: by them each runs on another model, smaller and shorter."""

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace

import torch


def parse(**defaults: str | int) -> Namespace:
    """Read the command line. defaults: the options, each with its default.

    The result has them, `device` and `dtype`: the GPU and bfloat16 if there is one, else the CPU and float32.
    """
    parser = ArgumentParser(formatter_class=ArgumentDefaultsHelpFormatter)
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return parser.parse_args(namespace=Namespace(device=device, dtype=dtype))
