# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
LARS, the optimizer of SimCLR.
"""

from collections.abc import Callable, Iterable

import torch


class LARS(torch.optim.Optimizer):
    """
    Layer-wise adaptive rate scaling ("Large Batch Training of Convolutional Networks"), as in
    SimCLR's code: for a weight w with gradient g,

        g <- g + weight_decay * w
        v <- momentum * v + lr * eta * |w| / |g| * g
        w <- w - v

    where the trust ratio eta * |w| / |g| is 1 if a norm is 0. The learning rate is inside the
    momentum, as SimCLR's "classic momentum" has it: unlike with torch's SGD, a new rate does not
    rescale the steps of the past.

    Parameters of at most one dimension (scales and shifts of normalisation, biases, the
    temperature) are neither decayed, whatever their group says, nor adapted: v <- momentum * v +
    lr * g.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eta: float = 0.001,
    ) -> None:
        """
        Args:
            params: parameters, or groups of them.
            lr: learning rate.
            momentum: in [0, 1).
            weight_decay: factor of the weights that is added to their gradient.
            eta: trust coefficient ("eeta" in SimCLR's code), above 0.
        """
        if lr < 0 or weight_decay < 0 or not 0 <= momentum < 1 or eta <= 0:
            raise ValueError(
                "LARS needs lr >= 0, weight_decay >= 0, momentum in [0, 1) and eta > 0, not "
                f"lr {lr}, weight_decay {weight_decay}, momentum {momentum}, eta {eta}"
            )
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eta": eta}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """
        Args:
            closure: computes the loss and the gradients anew, as in torch's optimizers.

        Returns:
            Tensor: the closure's loss, if there is one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group)
        return loss

    def _update(self, weight: torch.Tensor, group: dict) -> None:
        update = weight.grad
        if weight.ndim > 1:
            update = update.add(weight, alpha=group["weight_decay"])
            update = update * _trust_ratio(weight, update, group["eta"])
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        velocity = state["momentum_buffer"]
        velocity.mul_(group["momentum"]).add_(update, alpha=group["lr"])
        weight.sub_(velocity)


def _trust_ratio(weight: torch.Tensor, gradient: torch.Tensor, eta: float) -> torch.Tensor:
    # On the device: a Python condition would wait for it.
    weight_norm, gradient_norm = weight.norm(), gradient.norm()
    defined = (weight_norm > 0) & (gradient_norm > 0)
    return torch.where(defined, eta * weight_norm / gradient_norm, 1.0)
