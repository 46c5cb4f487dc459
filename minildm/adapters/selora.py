"""SeLoRA: the rank of each layer grows during training, where Fisher information says so (arXiv:2408.07196).

Every layer starts at rank 1. Every ``expand_interval`` steps each layer is tested (fisher.py); where the Fisher ratio
reaches ``expand_threshold`` (lambda), the tested row K joins lora_A and a zero column joins lora_B. The scale is
constant, so growth does not change the output.

Rows live in blocks of 8. Those not yet in use are zeros: a zero row with a zero column has no gradient in either and
stays zero under Adam, so shapes are constant for the compiler, the optimizer and the checkpoint while a block fills. A
full layer gets another block, a parameter of its own, beside the old one: no shape that was there ever changes, and so
no product is rounded otherwise than before. That makes growth exact to the last bit.
"""

import torch
from torch import nn

from minildm.adapters.lora import LoRALinear, kaiming_rows

BLOCK = 8  # rows


class SeLoRALinear(LoRALinear):
    """LoRA with room to grow: blocks of lora_A (8, in) and lora_B (out, 8), of which ``rank`` rows are in use."""

    def __init__(self, base, rank, scale, generator):
        nn.Module.__init__(self)
        self.base, self.scale, self.probe = base, scale, None
        self.lora_A, self.lora_B = nn.ParameterList(), nn.ParameterList()
        self._rank = 0
        self.grow(kaiming_rows(rank, base.in_features, generator).t())

    @property
    def rank(self):
        return self._rank

    def blocks(self):
        return list(zip(self.lora_A, self.lora_B))

    def factors(self):
        A = torch.cat([block.detach() for block in self.lora_A])
        B = torch.cat([block.detach() for block in self.lora_B], dim=1)
        return A[: self.rank], B[:, : self.rank]

    def grow(self, expansion):
        """Insert the tested K (in, k) as rows of lora_A, under zero columns of lora_B.

        Returns: the new parameters, for the optimizer: [] while there was room in the last block.
        """
        new, device = [], self.base.weight.device
        for row in expansion.t():
            if self.rank == BLOCK * len(self.lora_A):
                self.lora_A.append(nn.Parameter(torch.zeros(BLOCK, self.base.in_features, device=device)))
                self.lora_B.append(nn.Parameter(torch.zeros(self.base.out_features, BLOCK, device=device)))
                new += [self.lora_A[-1], self.lora_B[-1]]
            self.lora_A[-1].data[self.rank % BLOCK] = row
            self._rank += 1
        return new


def layers_to_grow(scores, ranks, costs, threshold, max_rank=None, max_parameters=None):
    """The layers that grow by one rank: a pure function of what was measured.

    Args:
        scores: {path: (original, expanded)} of the Fisher probe.
        ranks: {path: present rank}. costs: {path: parameters one more rank takes, in + out}.
        threshold: lambda; a layer grows where expanded / original >= lambda.
        max_rank: no layer beyond it. max_parameters: not more in all; the highest ratios come first.
    Returns: list of paths, highest ratio first. A layer without gradients (0 / 0) does not grow.
    """
    ratios = {path: expanded / original for path, (original, expanded) in scores.items() if original > 0}
    room = None if max_parameters is None else max_parameters - sum(ranks[path] * costs[path] for path in ranks)
    grown = []
    for path in sorted(ratios, key=lambda path: (-ratios[path], path)):
        if ratios[path] < threshold or (max_rank is not None and ranks[path] >= max_rank):
            continue
        if room is not None:
            if costs[path] > room:
                continue
            room -= costs[path]
        grown.append(path)
    return grown
