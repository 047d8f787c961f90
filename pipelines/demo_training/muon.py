"""Implement the optimiser Muon, which orthogonalises the momentum of matrices and of convolution kernels."""

from collections import defaultdict
from collections.abc import Iterable

import torch


def orthogonalise(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Make matrices ``[n, rows, columns]`` nearly orthogonal (singular values about 1); returns bf16."""
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):  # quintic Newton-Schulz iteration
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay.

    Tensors of equal shape are updated together. Each counts as a matrix: its first dimension gives the rows, the others
    together the columns. Updates have the root mean square of AdamW's updates (.2), so that ``lr`` means the same for
    both optimisers.
    """

    def __init__(
        self, params: Iterable[torch.Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ):
        by_shape = defaultdict(list)
        for param in params:
            by_shape[param.shape].append(param)
        groups = [{"params": group} for group in by_shape.values()]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params, lr, momentum = group["params"], group["lr"], group["momentum"]
            grads = torch.stack([param.grad.flatten(1) for param in params])
            state = self.state[params[0]]
            average = state.setdefault("average", torch.zeros_like(grads)).lerp_(grads, 1 - momentum)
            updates = orthogonalise(grads.lerp(average, momentum)).to(grads.dtype)
            updates *= 0.2 * max(grads.shape[1:]) ** 0.5
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            torch._foreach_add_(params, [update.view(params[0].shape) for update in updates], alpha=-lr)
