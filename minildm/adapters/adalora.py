"""AdaLoRA: rank is pruned where it matters least (Zhang et al. 2023, arXiv:2303.10512).

    dW = scale lora_B diag(lora_E) lora_A        Eq. 3, there P Lambda Q        scale = alpha / init_rank, constant

Triplet i of a layer is column i of lora_B (out, init_rank), number i of lora_E (init_rank, 1) and row i of lora_A
(init_rank, in). lora_A and lora_B start normal with standard deviation 0.02, lora_E zero, so a new adapter changes
nothing. Every layer starts with ``init_rank`` triplets. All of them then compete for a budget, which falls to
``target_rank`` per layer on average. After each step of the optimizer:

    importance  of each parameter: smoothed |p g|, times its smoothed deviation         Eq. 8-11    `Importance.update`
    score       of a triplet: lora_E's importance plus the means over row and column    Eq. 7       `Importance.scores`
    budget      b(t): how many triplets stay                                            Eq. 12      `rank_budget`
    prune       every ``prune_interval`` steps: lora_E = 0 outside the b(t) highest     Eq. 6       `AdaLoRA.update`

lora_E of a pruned triplet still gets a gradient, so the triplet can come back until the budget has reached its target.
Then the mask is frozen: pruned triplets are neither saved nor counted, and a layer may have rank 0. Only weights of
this final phase are kept as the best. The loss gets a penalty on lora_A and lora_B that are not orthogonal, see
`AdaLoRA.penalty`. A saved AdaLoRA is a plain LoRA.

Cost beyond LoRA's: until the mask is frozen, two numbers for each trained one (28 MB for SD v1.5 at rank 6) and about
ten passes over the adapter's parameters a step; throughout, the penalty's products of (init_rank, d) matrices. For SD
v1.5 all that takes 0.1 s a step on one CPU core.

Differs from the paper's equations, as PEFT and the authors' code do:
    Eq. 3 shows no scale; section 4 adds LoRA's alpha / r. (PEFT divides by init_rank + 1e-5, here it is init_rank.) The
    authors use alpha 16 or 32, so scales of about 1 to 16; the default here is scale 1.
    Eq. 4 sums squared Frobenius norms; the penalty is a mean of norms that are not squared.
    Eq. 8 takes p and g of the same step; here p is the value after the step, so that lora_E of a triplet just pruned
    (0 before the step) still gets a score.
    Eq. 12 prints (t - t_i - t_f) / (T - t_i - t_f); the budget would exceed b(0) after t_i and jump at T - t_f.
Differs from PEFT, too: where scores tie, exactly b(t) triplets stay, spread evenly over the layers (PEFT prunes all
that tie at the threshold). t counts from 1 (PEFT's examples: from 0), so a run always reaches T - t_f.
"""

from dataclasses import dataclass

import torch
from torch import nn

from minildm.adapters.inject import LAYERS, NETWORKS
from minildm.adapters.lora import LoRA, LoRALinear
from minildm.errors import InputError
from minildm.settings import Settings, setting

BETA1, BETA2 = 0.85, 0.85  # smoothing of sensitivity and of uncertainty (the paper's and PEFT's values)


class AdaLoRALinear(LoRALinear):
    """LoRA with a factor for each triplet, ``lora_E``, and the final phase's mask (all ones before it)."""

    kind = "adalora"

    def __init__(self, base, rank, scale, generator):
        super().__init__(base, rank, scale, generator)
        device = base.weight.device
        for factor in (self.lora_A, self.lora_B):
            factor.data = (0.02 * torch.randn(factor.shape, generator=generator)).to(device)
        self.lora_E = nn.Parameter(torch.zeros(rank, 1, device=device))
        self.register_buffer("mask", torch.ones(rank, 1, device=device), persistent=False)

    def blocks(self):
        # The mask, because in the final phase lora_E of a pruned triplet need not be 0: the optimizer's momentum
        # moves it, and a moving average of the weights remembers it.
        return [(self.mask * self.lora_E * self.lora_A, self.lora_B)]

    def factors(self):
        kept = self.mask[:, 0].bool()
        return (self.lora_E * self.lora_A).detach()[kept], self.lora_B.detach()[:, kept]

    def n_parameters(self):
        return self.rank * (self.base.in_features + self.base.out_features + 1)

    def freeze(self, kept, rank):
        """Keep the ``rank`` triplets where ``kept`` (init_rank,) is True, and no others, from now on."""
        self.mask.copy_(kept[:, None])
        self.rank = rank


class Importance:
    """Sensitivity and uncertainty of each parameter, smoothed over steps, and the triplets' scores."""

    def __init__(self, layers):
        self.parameters = [p for layer in layers for p in (layer.lora_E, layer.lora_A, layer.lora_B)]
        self.sensitivity = [torch.zeros_like(p, requires_grad=False) for p in self.parameters]
        self.uncertainty = [torch.zeros_like(p, requires_grad=False) for p in self.parameters]

    @torch.no_grad()
    def update(self):
        """Take in the parameters after a step, and the gradients of that step."""
        sensitivity = torch._foreach_mul(self.parameters, [p.grad for p in self.parameters])
        torch._foreach_abs_(sensitivity)  # Eq. 8
        torch._foreach_lerp_(self.sensitivity, sensitivity, 1 - BETA1)  # Eq. 9
        deviation = torch._foreach_abs(torch._foreach_sub(sensitivity, self.sensitivity))
        torch._foreach_lerp_(self.uncertainty, deviation, 1 - BETA2)  # Eq. 10, around the new mean

    def scores(self):
        """(layers, init_rank): the score of each triplet."""
        s = torch._foreach_mul(self.sensitivity, self.uncertainty)  # Eq. 11
        triplets = zip(s[::3], s[1::3], s[2::3])
        return torch.stack([E[:, 0] + (A.mean(1) + B.mean(0)) for E, A, B in triplets])  # Eq. 7


def rank_budget(t, t_start, t_end, initial, target):
    """b(t), the number of triplets that stay after t steps (Eq. 12, as PEFT computes it; see the top of the page).

    Args: t_start: t_i, until which it is ``initial``. t_end: T - t_f, from which it is ``target``. Between: a cubic.
    """
    if t >= t_end:
        return target
    if t <= t_start:
        return initial
    return int((initial - target) * (1 - (t - t_start) / (t_end - t_start)) ** 3 + target)


def highest(scores, budget):
    """The mask of the ``budget`` highest scores of all layers (layers, init_rank); of equal ones, the lower index."""
    order = scores.t().flatten().argsort(descending=True, stable=True)
    kept = torch.zeros_like(order, dtype=torch.bool)
    kept[order[:budget]] = True
    return kept.view(scores.t().shape).t()


@dataclass(frozen=True)
class AdaLoRASettings(Settings):
    init_rank: int = setting(6, "rank of every layer at the start", at_least=1)
    target_rank: int = setting(4, "mean rank of the layers at the end", at_least=1)
    alpha: float | None = setting(None, "scale = alpha / init_rank, constant (default: scale 1)", above=0)
    layers: str = setting("all-linear", "which linear layers to adapt", choices=tuple(LAYERS))
    targets: tuple[str, ...] = setting(NETWORKS, "which networks to adapt", choices=NETWORKS)
    text_encoder_rate: float = setting(1.0, "the text encoder's learning rate, as a multiple of --lr", at_least=0)
    # The authors' scripts for GLUE and SQuAD spend 5 to 18 % of a run before pruning and 44 to 58 % after it.
    initial_share: float = setting(0.1, "share of the run before pruning begins", at_least=0, below=1)
    final_share: float = setting(0.5, "share of the run after pruning, with the final ranks", at_least=0, below=1)
    prune_interval: int = setting(10, "steps between prunings", at_least=1)
    orthogonality_weight: float = setting(0.5, "weight of the orthogonality penalty in the loss", at_least=0)

    rank_stabilized = False  # no setting: alpha is divided by init_rank
    rank = property(lambda self: self.init_rank)  # what LoRA's constructor reads

    def __post_init__(self):
        super().__post_init__()
        if self.target_rank > self.init_rank:
            raise InputError(
                f"--target-rank must be at most --init-rank, got {self.target_rank} and {self.init_rank}; "
                "AdaLoRA only lowers ranks"
            )
        if self.initial_share + self.final_share >= 1:
            raise InputError(
                f"--initial-share {self.initial_share:g} and --final-share {self.final_share:g} leave no step to prune "
                "in; their sum must be below 1"
            )


class AdaLoRA(LoRA):
    """Budget allocation as a training method."""

    settings_class = AdaLoRASettings
    layer_class = AdaLoRALinear
    # The authors' scripts use 5e-4 to 2.2e-3, with alpha / r between about 1 and 16. At scale 1, and while lora_E is
    # small, dW moves far less per step than LoRA's: at LoRA's 1e-4 a short run learns nothing.
    defaults = {"lr": 1e-3}
    can_freeze_text_encoder = False  # its ranks are pruned by importance, which gradients tell
    follows_end = ("the rank budget (until it has reached its target)",)

    def __init__(self, model, settings, steps, seed):
        super().__init__(model, settings, steps, seed)
        self.t_start = int(settings.initial_share * steps)
        # At least one step of the final phase, or a last step that is skipped as not finite would leave no result.
        self.t_end = max(1, steps - max(1, int(settings.final_share * steps)))
        self.t_start = min(self.t_start, self.t_end - 1)
        self.frozen = False
        self.importance = Importance(self.layers.values())

    def penalty(self):
        """``orthogonality_weight`` times the mean of ||A A^T - I||_F and ||B^T B - I||_F over all layers.

        PEFT's form of Eq. 4. A and B are whole: pruned triplets count, too.
        """
        by_width = {}  # factors of one width share a product
        for layer in self.layers.values():
            for rows in (layer.lora_A, layer.lora_B.t()):
                by_width.setdefault(rows.shape[1], []).append(rows)
        norms = []
        for group in by_width.values():
            rows = torch.stack(group)  # (n, init_rank, width)
            identity = torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
            norms.append(torch.linalg.matrix_norm(rows @ rows.mT - identity))  # (n,)
        return self.settings.orthogonality_weight * torch.cat(norms).mean()

    def update(self, step, optimizer):
        """Score and prune. Returns: budget and ranks, to log; {} at steps without pruning."""
        t = step + 1  # steps taken
        if self.frozen:
            return {}
        if t < self.t_end:
            self.importance.update()
            if t <= self.t_start or t % self.settings.prune_interval != 0:
                return {}
        n, settings = len(self.layers), self.settings
        budget = rank_budget(t, self.t_start, self.t_end, n * settings.init_rank, n * settings.target_rank)
        kept = highest(self.importance.scores(), budget)
        for layer, row in zip(self.layers.values(), kept):
            layer.lora_E.data.masked_fill_(~row[:, None], 0.0)  # Eq. 6
        if t >= self.t_end:  # not ==: that step may have been skipped as not finite
            self.freeze(kept)
        return {"budget": budget, "ranks": dict(zip(self.layers, kept.sum(1).tolist()))}

    def freeze(self, kept):
        """Begin the final phase: the mask ``kept`` (layers, init_rank) stays."""
        for layer, row, rank in zip(self.layers.values(), kept, kept.sum(1).tolist()):
            layer.freeze(row, rank)
        self.frozen, self.importance = True, None

    def may_be_best(self, step):
        """Not before the budget has reached its target."""
        return self.frozen

    def describe(self):
        n, settings = len(self.layers), self.settings
        return [
            *super().describe(),
            f"rank budget: {n * settings.init_rank} until step {self.t_start}, {n * settings.target_rank} from step "
            f"{self.t_end} on",
        ]

    def state_dict(self):
        if self.frozen:
            return {"mask": torch.stack([layer.mask[:, 0].bool() for layer in self.layers.values()])}
        return {"sensitivity": self.importance.sensitivity, "uncertainty": self.importance.uncertainty}

    def load_state_dict(self, state):
        if "mask" in state:
            self.freeze(state["mask"])
            return
        torch._foreach_copy_(self.importance.sensitivity, state["sensitivity"])
        torch._foreach_copy_(self.importance.uncertainty, state["uncertainty"])
