"""AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101, Algorithm 2) with a step count for each row of an adapter.

Adam divides its running means by 1 - beta^t, for they start at zero. A row that SeLoRA adds at step 1000 has means
that start at zero too, but with the old t the divisor is already 1: at its first step the mean of the gradient is
0.1 g and the root of the mean square 0.032 |g|, an update of 3.2 lr instead of lr. So each row counts from its birth.

All parameters move together in a few fused passes (torch._foreach_*); those whose rows differ in age take two small
ones each besides.
"""

import torch


class AdamW:
    """Steps for a list of parameters. A parameter that got no gradient counts as one whose gradient is zero."""

    def __init__(self, parameters, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        self.parameters, self.betas, self.eps, self.weight_decay = [], betas, eps, weight_decay
        self.means, self.squares = [], []  # running means of the gradient and of its square
        self.count = 0  # steps taken
        self.born = []  # of each parameter: the count when it came; or, where rows differ, (their dimension, tensor)
        self.add(parameters)

    def add(self, parameters):
        """Train these too, from now on."""
        for parameter in parameters:
            self.parameters.append(parameter)
            self.means.append(torch.zeros_like(parameter, requires_grad=False))
            self.squares.append(torch.zeros_like(parameter, requires_grad=False))
            self.born.append(self.count)
        self._place_rows()

    def restart(self, parameter, row, dim):
        """Count one row (``dim`` 0) or column (1) from now on; the others keep their state."""
        i = next(i for i, other in enumerate(self.parameters) if other is parameter)
        if not isinstance(self.born[i], tuple):
            self.born[i] = (dim, torch.full((parameter.shape[dim],), self.born[i]))
        self.born[i][1][row] = self.count
        self.means[i].select(dim, row).zero_()
        self.squares[i].select(dim, row).zero_()
        self._place_rows()

    def _place_rows(self):
        """The births of all rows of uneven parameters, in one tensor on the device."""
        self.even = [i for i, born in enumerate(self.born) if not isinstance(born, tuple)]
        self.uneven = [i for i, born in enumerate(self.born) if isinstance(born, tuple)]
        if self.uneven:
            device = self.parameters[0].device
            self.rows_born = torch.cat([self.born[i][1] for i in self.uneven]).to(device, torch.float64)

    @torch.no_grad()
    def step(self, lr):
        """Update the parameters by their gradients."""
        beta1, beta2 = self.betas
        self.count += 1
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        torch._foreach_lerp_(self.means, gradients, 1 - beta1)
        torch._foreach_mul_(self.squares, beta2)
        torch._foreach_addcmul_(self.squares, gradients, gradients, 1 - beta2)
        if self.weight_decay:
            torch._foreach_mul_(self.parameters, 1 - lr * self.weight_decay)

        deviations = torch._foreach_sqrt(self.squares)
        ages = [self.count - self.born[i] for i in self.even]
        rows = self._ages_of_rows()
        if self.even:
            torch._foreach_div_([deviations[i] for i in self.even], [(1 - beta2**age) ** 0.5 for age in ages])
        for i, age in rows.items():
            deviations[i].div_((1 - beta2**age).sqrt().float())
        torch._foreach_add_(deviations, self.eps)

        updates = torch._foreach_div(self.means, deviations)
        if self.even:
            torch._foreach_mul_([updates[i] for i in self.even], [-lr / (1 - beta1**age) for age in ages])
        for i, age in rows.items():
            updates[i].mul_((-lr / (1 - beta1**age)).float())
        torch._foreach_add_(self.parameters, updates)

    def _ages_of_rows(self):
        """{parameter's number: steps each of its rows has been trained, shaped to multiply it}."""
        if not self.uneven:
            return {}
        ages = self.count - self.rows_born
        dims = [self.born[i][0] for i in self.uneven]
        parts = ages.split([len(self.born[i][1]) for i in self.uneven])
        return {i: part[:, None] if dim == 0 else part for i, dim, part in zip(self.uneven, dims, parts)}

    # --- saved states ------------------------------------------------------------------------------------------------
    def state_dict(self):
        """Tensors and numbers, in the order of the parameters."""
        return {"count": self.count, "born": list(self.born), "means": list(self.means), "squares": list(self.squares)}

    def load_state_dict(self, state):
        """Go on from ``state``, for the same parameters in the same order."""
        assert [m.shape for m in state["means"]] == [p.shape for p in self.parameters], "another list of parameters"
        self.count, self.born = state["count"], list(state["born"])
        torch._foreach_copy_(self.means, state["means"])
        torch._foreach_copy_(self.squares, state["squares"])
        self._place_rows()


def clip_gradients(parameters, largest):
    """Scale the gradients of a *list* of parameters so that their joint norm is at most ``largest``; 0 = leave them.

    Returns: the norm before, a scalar tensor (an iterator that has run out would be clipped to nothing, and say 0).
    """
    assert isinstance(parameters, list) and parameters, "clip_gradients needs a list of parameters"
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.stack(torch._foreach_norm(gradients)).norm()
    if largest:
        torch._foreach_mul_(gradients, (largest / (norm + 1e-6)).clamp(max=1))
    return norm
