"""DyLoRA: one adapter for every rank up to ``max_rank`` (Valipour et al. 2022, arXiv:2210.07558).

    dW at rank b = scale lora_B[:, :b] lora_A[:b]        lora_A (max_rank, in), lora_B (out, max_rank)

Algorithm 1, whole on this page. Each step of the optimizer:

    sample      the rank b, uniformly from 1, ..., max_rank, the same for all layers     `DyLoRA.watch`
    truncate    forward and backward use rows 1 to b of lora_A, columns 1 to b of lora_B `DyLoRALinear.blocks`
    update      "prefix": all of these rows; "single": row b alone, on top of the others `RowAdamW.step`

So the rows come out ordered by importance (with "single", row b learns what rows 1 to b - 1 leave over). The model at
rank b + 1 is the model at rank b plus one row, and one file serves all ranks: ``--adapter RUN@2`` loads rank 2. Outside
training steps nothing is random: validation, samples and files see the full rank, or the one that `at_rank` sets. At
the end, the validation loss of the last step's weights is measured at each rank (above 16: at powers of two and the
last); the saved adapter holds the weights that were best at full rank.

scale = alpha / max_rank, the same at every rank. The paper (Eq. 7) multiplies by alpha / b, b the rank in use, in
training, and the authors' code afterwards, too; then another rank rescales all rows, and the models are nested only up
to that factor.

Cost: parameters and optimizer state of LoRA at ``max_rank``, and about the time of its steps; products are of rank
(max_rank + 1) / 2 on average. The end takes a validation per rank; ``--compile`` compiles once per rank.

Differs from the paper, besides the scale: b is uniform, as in the authors' script (the paper also tests a geometric
distribution). "single" is its frozen mode (Eq. 10). Rows outside the update keep their value, Adam's means and their
age; in the authors' code they have a gradient of zero, and Adam's old means and weight decay still move them. All
linear layers can be adapted.
"""

import contextlib
from dataclasses import dataclass

import torch

from minildm.adapters.inject import LAYERS, NETWORKS
from minildm.adapters.lora import LoRA, LoRALinear
from minildm.seeds import seeded
from minildm.settings import Settings, setting


class DyLoRALinear(LoRALinear):
    """LoRA whose first ``rank`` rows are in use; those before ``first_trained`` get no gradient."""

    kind = "dylora"

    def __init__(self, base, rank, scale, generator):
        super().__init__(base, rank, scale, generator)
        self.max_rank, self.first_trained = rank, 0

    def blocks(self):
        A, B, fixed = self.lora_A[: self.rank], self.lora_B[:, : self.rank], self.first_trained
        if fixed:
            A = torch.cat([A[:fixed].detach(), A[fixed:]])
            B = torch.cat([B[:, :fixed].detach(), B[:, fixed:]], dim=1)
        return [(A, B)]  # (rank, in), (out, rank)


@contextlib.contextmanager
def at_rank(layers, active_rank, first_trained=0):
    """Inside, ``layers`` (wrappers) use their first ``active_rank`` rows; afterwards all of them."""
    layers = list(layers)
    for layer in layers:
        layer.rank, layer.first_trained = active_rank, first_trained
    try:
        yield
    finally:
        for layer in layers:
            layer.rank, layer.first_trained = layer.max_rank, 0


class RowAdamW:
    """AdamW, with the interface of minildm's, that moves some rows and leaves the others their value, means and age.

    All layers use the same rows, so the state is one table (max_rank, width): row i holds row i of each lora_A and
    column i of each lora_B, side by side.

    Args: trained: {name: parameter}. rows: () -> (first, end) of the rows to move. The others as in `AdamW`.
    """

    def __init__(self, trained, rows, factors=None, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        self.parameters, self.rows = list(trained.values()), rows
        self.factors = [1.0] * len(trained) if factors is None else factors
        self.columns = [name.endswith("lora_B") for name in trained]
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.means, self.squares = (torch.cat(self.in_rows(self.parameters), dim=1).zero_() for _ in range(2))
        self.ages = torch.zeros(len(self.means), 1, dtype=torch.float64, device=self.means.device)

    def in_rows(self, tensors):
        """Views (max_rank, width) of the parameters, or of their gradients."""
        return [tensor.detach().t() if column else tensor.detach() for tensor, column in zip(tensors, self.columns)]

    def take_restarted(self):
        return []

    @torch.no_grad()
    def step(self, lr):
        """Update the rows by their gradients; a parameter without one counts as having gradient zero."""
        moving = slice(*self.rows())
        parameters = [rows[moving] for rows in self.in_rows(self.parameters)]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        gradients = torch.cat([rows[moving] for rows in self.in_rows(gradients)], dim=1)  # (rows that move, width)
        means, squares, ages = self.means[moving], self.squares[moving], self.ages[moving]
        beta1, beta2 = self.betas
        ages += 1
        means.lerp_(gradients, 1 - beta1)
        squares.mul_(beta2).addcmul_(gradients, gradients, value=1 - beta2)
        deviations = squares.sqrt().mul_(((1 - beta2**ages) ** -0.5).to(squares.dtype)).add_(self.eps)
        updates = means / deviations * (-lr / (1 - beta1**ages)).to(means.dtype)
        if self.weight_decay:
            torch._foreach_mul_(parameters, [1 - lr * factor * self.weight_decay for factor in self.factors])
        updates = list(updates.split([rows.shape[1] for rows in parameters], dim=1))
        torch._foreach_mul_(updates, self.factors)
        torch._foreach_add_(parameters, updates)

    def state_dict(self):
        return {"ages": self.ages, "means": self.means, "squares": self.squares}

    def load_state_dict(self, state):
        """Continue from ``state``, for the same parameters in the same order."""
        for name, values in state.items():
            getattr(self, name).copy_(values)


@dataclass(frozen=True)
class DyLoRASettings(Settings):
    max_rank: int = setting(8, "the adapter can be used at every rank from 1 to this", at_least=1)
    alpha: float | None = setting(None, "scale = alpha / max rank, at every rank (default: scale 1)", above=0)
    update_rule: str = setting(
        "prefix",
        "a step at rank b updates rows 1 to b, or row b alone (the paper's frozen mode)",
        choices=("prefix", "single"),
    )
    layers: str = setting("all-linear", "which linear layers to adapt", choices=tuple(LAYERS))
    targets: tuple[str, ...] = setting(NETWORKS, "which networks to adapt", choices=NETWORKS)
    text_encoder_rate: float = setting(1.0, "the text encoder's learning rate, as a multiple of --lr", at_least=0)

    rank_stabilized = False  # no setting: alpha is divided by max_rank
    rank = property(lambda self: self.max_rank)  # what LoRA's constructor reads


class DyLoRA(LoRA):
    """Algorithm 1 as a training method."""

    settings_class = DyLoRASettings
    layer_class = DyLoRALinear
    can_freeze_text_encoder = False  # each step uses another rank
    reads_captions = False  # at its full rank, while lower ranks must work, too

    def __init__(self, model, settings, steps, seed):
        super().__init__(model, settings, steps, seed)
        self.parameters = super().trained()  # never changes
        self.rows = (0, settings.max_rank)  # (first, end) of the rows that the present step trains
        self.curve = {}  # {rank: validation loss} at the end

    def trained(self):
        return self.parameters

    def optimizer(self, config, trained):
        factors = [self.rate(name) for name in trained]
        return RowAdamW(trained, lambda: self.rows, factors, weight_decay=config.weight_decay)

    @contextlib.contextmanager
    def watch(self, step):
        """Sample and truncate: the rank depends on the seed and the step alone."""
        generator = seeded(self.seed, "rank", step)
        b = torch.randint(1, self.settings.max_rank + 1, (), generator=generator).item()
        self.rows = (b - 1 if self.settings.update_rule == "single" else 0, b)
        with at_rank(self.layers.values(), b, first_trained=self.rows[0]):
            yield

    def update(self, step, optimizer):
        """Log the step's rank, on which its loss depends; nothing changes."""
        return {"active_rank": self.rows[1]}

    def finish(self, validate):
        """Measure the validation loss at each rank."""
        if validate is None:
            return {}
        for rank in curve_ranks(self.settings.max_rank):
            with at_rank(self.layers.values(), rank):
                self.curve[rank] = validate()
        return {"validation_by_rank": self.curve}

    def describe(self):
        first, *counts = super().describe()
        lines = [first, f"the adapter can be loaded at any rank: --adapter RUN@1 to RUN@{self.settings.max_rank}"]
        if self.curve:
            losses = ", ".join(f"{loss:.4f} at {rank}" for rank, loss in self.curve.items())
            lines.append(f"validation loss by rank, after the last step: {losses}")
        return lines + counts

    def state_dict(self):
        return {"curve": self.curve}

    def load_state_dict(self, state):
        self.curve = state["curve"]


def curve_ranks(max_rank):
    """The ranks to measure: all, or for more than 16 the powers of two and the last."""
    if max_rank <= 16:
        return list(range(1, max_rank + 1))
    return sorted({2**i for i in range(max_rank.bit_length())} | {max_rank})
