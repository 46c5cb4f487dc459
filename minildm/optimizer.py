"""The optimizers: AdamW with an age for each row of an adapter, torch's fused AdamW, and a moving average of weights.

AdamW: Loshchilov and Hutter 2019, arXiv:1711.05101, Algorithm 2. Adam divides its running means by 1 - beta^t, because
they start at zero. The means of a row that SeLoRA adds at step 1000 start at zero, too, but with the old t the divisor
is already 1: its first step would be 0.1 g / (0.032 |g|), 3.2 times the learning rate. So each row counts its own
steps.
"""

import torch


class AdamW:
    """Steps for a list of parameters. All move together in a few passes (torch._foreach_*); parameters whose rows
    differ in age take two small passes more.

    A parameter without a gradient is left alone at that step: its value, its means and its age stay (as in torch).

    Args: factors: of the learning rate, one for each parameter; None = 1.
    """

    def __init__(self, parameters, factors=None, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.parameters, self.factors = [], []
        self.means, self.squares = [], []  # running means of the gradient and of its square
        self.ages = []  # steps each parameter has taken; or, where rows differ, (dimension of the rows, float64 tensor)
        self.restarted = []  # (parameter, row, dim) since `take_restarted`
        self.add(parameters, factors)

    def add(self, parameters, factors=None):
        """Train these too, from now on."""
        for parameter, factor in zip(parameters, [1.0] * len(parameters) if factors is None else factors, strict=True):
            self.parameters.append(parameter)
            self.factors.append(factor)
            self.means.append(torch.zeros_like(parameter, requires_grad=False))
            self.squares.append(torch.zeros_like(parameter, requires_grad=False))
            self.ages.append(0)

    def restart(self, parameter, row, dim):
        """Give one row (``dim`` 0) or column (1) a new state, age 0; the others keep theirs."""
        i = next(i for i, other in enumerate(self.parameters) if other is parameter)
        assert not isinstance(self.ages[i], tuple) or self.ages[i][0] == dim, "rows and columns cannot both restart"
        if not isinstance(self.ages[i], tuple):
            rows = torch.full((parameter.shape[dim],), self.ages[i], dtype=torch.float64, device=parameter.device)
            self.ages[i] = (dim, rows)
        self.ages[i][1][row].zero_()  # "= 0" would copy the 0 to a GPU, and wait for it
        self.means[i].select(dim, row).zero_()
        self.squares[i].select(dim, row).zero_()
        self.restarted.append((parameter, row, dim))

    def take_restarted(self):
        """The rows restarted since the last call: [(parameter, row, dim)]."""
        restarted, self.restarted = self.restarted, []
        return restarted

    @torch.no_grad()
    def step(self, lr):
        """Update the parameters by their gradients."""
        active = [i for i, parameter in enumerate(self.parameters) if parameter.grad is not None]
        if not active:
            return
        beta1, beta2 = self.betas
        parameters, means, squares = (
            [items[i] for i in active] for items in (self.parameters, self.means, self.squares)
        )
        gradients, factors = [p.grad for p in parameters], [self.factors[i] for i in active]
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        if self.weight_decay:
            torch._foreach_mul_(parameters, [1 - lr * factor * self.weight_decay for factor in factors])

        ages = self._grow_older(active)
        deviations = torch._foreach_sqrt(squares)
        _scale(deviations, [(1 - beta2**age) ** -0.5 for age in ages])
        torch._foreach_add_(deviations, self.eps)
        updates = torch._foreach_div(means, deviations)
        _scale(updates, [-lr * factor / (1 - beta1**age) for factor, age in zip(factors, ages)])
        torch._foreach_add_(parameters, updates)

    def _grow_older(self, active):
        """Count a step for the active parameters. Returns: their ages, numbers or tensors that broadcast over them."""
        uneven = [self.ages[i][1] for i in active if isinstance(self.ages[i], tuple)]
        if uneven:
            torch._foreach_add_(uneven, 1)
        ages = []
        for i in active:
            if isinstance(self.ages[i], tuple):
                dim, rows = self.ages[i]
                ages.append(rows[:, None] if dim == 0 else rows)
            else:
                self.ages[i] += 1
                ages.append(self.ages[i])
        return ages

    def state_dict(self):
        """Tensors and numbers, in the order of the parameters."""
        return {"ages": list(self.ages), "means": list(self.means), "squares": list(self.squares)}

    def load_state_dict(self, state):
        """Continue from ``state``, for the same parameters in the same order. Raises: ValueError for others."""
        shapes = [p.shape for p in self.parameters]
        if any([m.shape for m in state[name]] != shapes for name in ("means", "squares")):
            raise ValueError("another list of parameters")
        if len(state["ages"]) != len(shapes) or not all(map(_is_age, state["ages"], shapes)):
            raise ValueError("ages of other parameters")
        device = {i: parameter.device for i, parameter in enumerate(self.parameters)}
        self.ages = [(a[0], a[1].to(device[i])) if isinstance(a, tuple) else a for i, a in enumerate(state["ages"])]
        if self.means:
            torch._foreach_copy_(self.means, state["means"])
            torch._foreach_copy_(self.squares, state["squares"])


def _is_age(age, shape):
    """Whether ``age`` counts the steps of a parameter of this ``shape``, or of its rows: from 0 to 10^9."""
    if type(age) is int:
        return 0 <= age <= 10**9
    if not (isinstance(age, tuple) and len(age) == 2 and age[0] in (0, 1) and isinstance(age[1], torch.Tensor)):
        return False
    dim, rows = age
    fits = rows.dtype == torch.float64 and rows.shape == shape[dim : dim + 1]
    return fits and bool(((rows >= 0) & (rows <= 1e9)).all())


def _scale(tensors, factors):
    """Multiply each tensor in place by its factor, a number (all of them in one pass) or a tensor of rows."""
    even = [i for i, factor in enumerate(factors) if not isinstance(factor, torch.Tensor)]
    if even:
        torch._foreach_mul_([tensors[i] for i in even], [factors[i] for i in even])
    for tensor, factor in zip(tensors, factors):
        if isinstance(factor, torch.Tensor):
            tensor.mul_(factor.to(tensor.dtype))


class FusedAdamW:
    """torch's own AdamW, with the interface of `AdamW`: for full fine-tuning, where the two spare copies of the weights
    that AdamW's passes hold would count. Parameters with the same factor share one pass over all of them."""

    def __init__(self, parameters, factors=None, weight_decay=0.0):
        self.parameters, self.factors = list(parameters), list(factors or [1.0] * len(parameters))
        groups = [
            {"params": [p for p, f in zip(self.parameters, self.factors) if f == factor], "factor": factor}
            for factor in dict.fromkeys(self.factors)
        ]
        self.torch = torch.optim.AdamW(groups, weight_decay=weight_decay, fused=True)

    def take_restarted(self):
        return []

    def step(self, lr):
        for group in self.torch.param_groups:
            group["lr"] = lr * group["factor"]
        self.torch.step()

    def state_dict(self):
        return self.torch.state_dict()

    def load_state_dict(self, state):
        """Continue from ``state``, for the same parameters in the same order. Raises: ValueError for others."""
        own = self.torch.state_dict()["param_groups"]
        ordered = [p for group in self.torch.param_groups for p in group["params"]]
        for i, kept in state["state"].items():
            if [kept[name].shape for name in ("step", "exp_avg", "exp_avg_sq")] != [(), *2 * (ordered[i].shape,)]:
                raise ValueError("another list of parameters")
            if not (kept["step"].isfinite() and _is_age(int(kept["step"]), ())):
                raise ValueError("ages of other parameters")
        self.torch.load_state_dict({"state": state["state"], "param_groups": own})


class MovingAverage:
    """Exponential moving average of parameters, by name. Early in training it averages over fewer steps: the decay
    rises from 0.1 to its value. ``decay`` 0: no average."""

    def __init__(self, decay):
        self.decay, self.values = decay, {}

    def add(self, parameters):
        """Begin to average {name: parameter}, with the values they have now."""
        if self.decay:
            self.values |= {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def restart(self, name, parameter, row, dim):
        """Reset a row's average to its current value, because the row was replaced."""
        if self.decay:
            self.values[name].select(dim, row).copy_(parameter.detach().select(dim, row))

    def update(self, step, parameters):
        """Take in {name: parameter} after ``step`` steps."""
        if self.values:
            decay = min(self.decay, step / (step + 9))
            live = [parameters[name].detach() for name in self.values]
            torch._foreach_lerp_(list(self.values.values()), live, 1 - decay)

    def swap(self, parameters):
        """Exchange the parameters' values with their averages."""
        for name, average in self.values.items():
            parameter = parameters[name]
            parameter.data, self.values[name] = average, parameter.data


def clip_gradients(parameters, largest):
    """Scale the gradients of a *list* of parameters so that their joint norm is at most ``largest``; 0 = leave them.

    Returns: the norm before, a scalar tensor. (An exhausted iterator would clip nothing and say 0.)
    """
    assert isinstance(parameters, list) and parameters, "clip_gradients needs a list of parameters"
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.stack(torch._foreach_norm(gradients)).norm()
    if largest:
        torch._foreach_mul_(gradients, (largest / (norm + 1e-6)).clamp(max=1))
    return norm
