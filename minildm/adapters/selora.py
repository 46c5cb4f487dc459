"""SeLoRA: the rank of each layer grows during training, where Fisher information says so (arXiv:2408.07196).

Algorithm 1, whole on this page:

    when      every ``expand_interval`` (t) steps                                     `SeLoRA.watch`
    probe     one random row K for each layer, tested within the ordinary backward    fisher.py has the derivation
    decide    layers whose Fisher ratio is at least ``expand_threshold`` (lambda)     `layers_to_grow`
    grow      K joins lora_A, a zero column joins lora_B                              `grow`

Every layer starts at rank 1 (``rank``). scale = alpha / starting rank and stays constant, so growth changes no output;
the row that was tested is the row that is inserted, and its column starts at zero.

Cost: at every t-th step four thin products per layer, below 1 % of a run. Differs from the paper: no second forward and
backward, a new row counts its own Adam steps (minildm/optimizer.py), and a layer without any gradient (0 / 0) does not
grow. ``expand_criterion expected`` (the mean over all K), ``max_rank`` and ``max_parameters`` are ours.

The authors' code (github.com/Yuchen20/SeLoRA) computes expanded / original, too, but squares the gradient of the batch
instead of each sample's, takes the expanded score after the optimizer's step, inserts a new random row instead of the
tested one, drops the layer's Adam state, gives lora_A six times the initial variance and uses alpha 8, so scale 8.
Ratios depend on start and scale: a lambda tuned there does not carry over.
"""

import contextlib
import sys
import warnings
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from minildm.adapters.fisher import probe_layers
from minildm.adapters.inject import target_paths
from minildm.adapters.lora import LoRA, LoRALinear, LoRASettings
from minildm.errors import InputError
from minildm.progress import say
from minildm.seeds import seeded
from minildm.settings import setting

# Rows come in blocks of 8. Those not yet in use are zeros: a zero row over a zero column has no gradient in either and
# stays zero under Adam. So while a block fills, no shape changes (for the compiler, the optimizer and the checkpoint),
# and a full layer gets another block beside the old ones: no product is rounded differently than before, and growth is
# exact to the last bit.
ROWS_PER_BLOCK = 8


class SeLoRALinear(LoRALinear):
    """LoRA with room to grow: lora_A and lora_B are lists of blocks, in which ``rank`` rows are in use."""

    kind = "selora"

    def __init__(self, base, rank, scale, generator):
        super().__init__(base, rank, scale, generator)
        room, A, B = -rank % ROWS_PER_BLOCK, self.lora_A.data, self.lora_B.data
        del self.lora_A, self.lora_B
        self.lora_A = nn.ParameterList([F.pad(A, (0, 0, 0, room))])  # (8 n, in)
        self.lora_B = nn.ParameterList([F.pad(B, (0, room))])  # (out, 8 n)

    def blocks(self):
        return list(zip(self.lora_A, self.lora_B))

    def add_block(self):
        zeros = self.base.weight.new_zeros
        self.lora_A.append(nn.Parameter(zeros(ROWS_PER_BLOCK, self.base.in_features, dtype=torch.float32)))
        self.lora_B.append(nn.Parameter(zeros(self.base.out_features, ROWS_PER_BLOCK, dtype=torch.float32)))

    def grow(self, row):
        """Append ``row`` (in,) to lora_A, over a zero column of lora_B.

        Returns: (its block of lora_A, its block of lora_B, its place in them, whether the blocks are new).
        """
        block, place = 0, self.rank
        while block < len(self.lora_A) and place >= len(self.lora_A[block]):
            block, place = block + 1, place - len(self.lora_A[block])
        new = block == len(self.lora_A)
        if new:
            self.add_block()
        self.lora_A[block].data[place] = row
        self.rank += 1
        return self.lora_A[block], self.lora_B[block], place, new


def layers_to_grow(scores, ranks, sizes, threshold, max_rank=None, max_parameters=None):
    """Decide: the layers that grow by one rank, a pure function of what was measured.

    Args:
        scores: {path: (original, expanded)} of the Fisher probe.
        ranks: {path: present rank}. sizes: {path: (in, out)} of the layers.
        threshold: lambda; a layer grows where expanded / original >= lambda.
        max_rank: limit for every layer, besides the smaller of in and out.
        max_parameters: limit for the whole adapter; the highest ratios come first.
    Returns: list of paths, highest ratio first. A layer without gradients (0 / 0) does not grow.
    """
    ratios = {path: expanded / original for path, (original, expanded) in scores.items() if original > 0}
    costs = {path: sum(sizes[path]) for path in ranks}  # parameters of one more rank
    room = None if max_parameters is None else max_parameters - sum(ranks[path] * costs[path] for path in ranks)
    chosen = []
    for path in sorted(ratios, key=lambda path: (-ratios[path], path)):
        limit = min(sizes[path]) if max_rank is None else min(*sizes[path], max_rank)
        if not ratios[path] >= threshold or ranks[path] >= limit or (room is not None and costs[path] > room):
            continue
        room = None if room is None else room - costs[path]
        chosen.append(path)
    return chosen


@dataclass(frozen=True)
class SeLoRASettings(LoRASettings):
    rank: int = setting(1, "rank of every layer at the start", at_least=1)
    alpha: float | None = setting(None, "scale = alpha / starting rank, constant (default: scale 1)", above=0)
    expand_threshold: float = setting(
        1.1,
        "lambda: a layer grows where its Fisher ratio, expanded / original, which is never below 1, reaches it",
        at_least=1,
    )
    expand_interval: int = setting(40, "t: steps between tests", at_least=1)
    expand_criterion: str = setting(
        "sampled", "test one random row (the paper), or the expectation over all rows", choices=("sampled", "expected")
    )
    max_rank: int | None = setting(None, "no layer grows beyond it (default: no limit)", at_least=1)
    max_parameters: int | None = setting(
        None, "the adapter does not grow beyond it; the highest ratios come first (default: no limit)", at_least=1
    )

    def __post_init__(self):
        super().__post_init__()
        if self.max_rank is not None and self.max_rank < self.rank:
            raise InputError(
                f"--max-rank must be at least --rank, the rank at the start, got {self.max_rank} and {self.rank}; "
                "SeLoRA only raises ranks"
            )


class SeLoRA(LoRA):
    """Algorithm 1 as a training method."""

    settings_class = SeLoRASettings
    layer_class = SeLoRALinear
    probe = None  # of the present step, where it is a test

    def __init__(self, model, settings, steps, seed):
        super().__init__(model, settings, steps, seed)
        if steps < settings.expand_interval:
            warnings.warn(
                f"no layer is ever tested, so no rank grows: --expand-interval {settings.expand_interval} is more than "
                f"the {steps} steps of the run",
                stacklevel=2,
            )

    @classmethod
    def check_fit(cls, model, settings):
        super().check_fit(model, settings)
        layers = map(model.get_submodule, target_paths(model, settings.targets, settings.layers))
        at_start = settings.rank * sum(layer.in_features + layer.out_features for layer in layers)
        if settings.max_parameters is not None and settings.max_parameters < at_start:
            raise InputError(
                f"--max-parameters {settings.max_parameters:,} is less than the adapter has at the start, {at_start:,} "
                f"at rank {settings.rank}; give more, or fewer --layers or --targets"
            )

    @contextlib.contextmanager
    def watch(self, step):
        """When, and probe: at every ``expand_interval``-th step, rows K that depend on the seed and the step alone."""
        self.probe = None
        if (step + 1) % self.settings.expand_interval != 0:
            yield
            return
        expected = self.settings.expand_criterion == "expected"
        generator = seeded(self.seed, "rows", step)
        # batch_size 1: scores in units of the loss as it is; the factor cancels in the ratio.
        with as_written(), probe_layers(self.layers, generator, expected, batch_size=1) as self.probe:
            yield

    def statistics(self):
        return [] if self.probe is None else [self.probe.sums]

    def update(self, step, optimizer):
        """Decide, and grow. Returns: every ratio and every rank, to log; {} at the steps between tests."""
        if self.probe is None:
            return {}
        scores, settings = self.probe.scores(), self.settings
        ranks = {path: layer.rank for path, layer in self.layers.items()}
        sizes = {path: (layer.base.in_features, layer.base.out_features) for path, layer in self.layers.items()}
        chosen = layers_to_grow(
            scores, ranks, sizes, settings.expand_threshold, settings.max_rank, settings.max_parameters
        )
        new_blocks = [self.grow(self.layers[path], self.probe.expansion(path), optimizer) for path in chosen]
        if self.compiled and any(new_blocks):
            self.level_blocks()
            say(f"note: a layer has outgrown {ROWS_PER_BLOCK} (16, ...) ranks; its network is compiled again")
        return {
            "fisher_ratios": {path: new / old if old > 0 else None for path, (old, new) in scores.items()},
            "ranks": {path: layer.rank for path, layer in self.layers.items()},
            "grown": len(chosen),
        }

    @staticmethod
    def grow(layer, K, optimizer):
        """Insert the tested K (in, k) as rows of lora_A. New rows and columns start with an Adam state of their own.

        Returns: whether a block was added.
        """
        added = False
        for row in K.t():
            A, B, place, new = layer.grow(row)
            added = added or new
            if not new:  # the parameters of a new block are new to the optimizer, too
                optimizer.restart(A, place, dim=0)
                optimizer.restart(B, place, dim=1)
        return added

    def level_blocks(self):
        """Give all layers of a network as many blocks. A new block compiles the network again; so that happens once,
        when its first layer grows beyond 8 (16, ...) ranks, and not for each layer that follows."""
        for network in self.settings.targets:
            layers = [layer for path, layer in self.layers.items() if path.startswith(f"{network}.")]
            n_blocks = max(len(layer.lora_A) for layer in layers)
            for layer in layers:
                while len(layer.lora_A) < n_blocks:
                    layer.add_block()

    def state_dict(self):
        layers = self.layers.items()
        return {
            "ranks": {path: layer.rank for path, layer in layers},
            "blocks": {path: len(layer.lora_A) for path, layer in layers},
        }

    def load_state_dict(self, state):
        """The values follow with the trained parameters."""
        for path, layer in self.layers.items():
            rank, blocks = state["ranks"][path], state.get("blocks", {}).get(path, 0)  # 0.2.0 had only blocks in use
            largest = sum(layer.base.weight.shape[:2])
            if not all(type(n) is int and n <= largest for n in (rank, blocks)) or rank < layer.rank:
                raise ValueError(f"rank {rank} in {blocks} blocks of {path}")
            while layer.rank < rank:
                layer.grow(0.0)
            while len(layer.lora_A) < blocks:
                layer.add_block()


def as_written():
    """Inside, compiled networks run as they are written, so that the probe sees each layer."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled; importing it takes seconds
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")
