"""The arguments that the examples have in common: by them each runs on another model, smaller and shorter."""

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace

import torch


def parse(model: str, output: str, **call: int) -> Namespace:
    """Read the command line: --model, --output, and an option for each argument of the pipeline's call.

    The result has them with these defaults: `model`, `output`, and in `call` what the pipeline is called with, a
    generator among it. `device` and `dtype` are the GPU and bfloat16 if there is one, else the CPU and float32.
    """
    parser = ArgumentParser(formatter_class=ArgumentDefaultsHelpFormatter)
    for name, default in {"model": model, "output": output, **call}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    given = vars(parser.parse_args())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Namespace(
        model=given.pop("model"),
        output=given.pop("output"),
        call=given | {"generator": torch.Generator().manual_seed(0)},
        device=device,
        dtype=torch.bfloat16 if device == "cuda" else torch.float32,
    )
