"""Which rank holds which experts, and which copy of an expert a slot goes to."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedmoe.backends.base import Places
from fusedmoe.errors import OptionError, explain


@dataclass(frozen=True)
class Placement:
    """Experts of each rank, in the order of its weights; an expert on several ranks is redundant, a rank may be empty.

    >>> hot = Placement(((0, 1), (2, 0)))
    >>> hot.num_experts, hot.ranks, hot.copies
    (3, 2, 2)
    """

    experts: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        """Check.

        Raises:
            OptionError: an expert is nowhere, or twice on one rank, or no number.
        """
        ranks = tuple(tuple(rank) for rank in self.experts)
        object.__setattr__(self, "experts", ranks)
        everywhere = [expert for rank in ranks for expert in rank]
        wanted = "every expert of 0 .. E - 1 on some rank, on none twice"
        do = "See Placement.contiguous for the usual one."
        if not everywhere or not all(isinstance(e, int) and e >= 0 for e in everywhere):
            raise OptionError(explain("placement", got=ranks, wanted=wanted, do=do))
        if missing := sorted(set(range(max(everywhere) + 1)) - set(everywhere)):
            raise OptionError(explain("placement", got=f"no rank with expert {missing[0]}", wanted=wanted, do=do))
        for number, rank in enumerate(ranks):
            if len(set(rank)) < len(rank):
                raise OptionError(explain(f"placement of rank {number}", got=rank, wanted=wanted, do=do))

    @classmethod
    def contiguous(cls, num_experts: int, ranks: int) -> Placement:
        """Runs of experts, the first ``num_experts % ranks`` ranks with one more."""
        each, more = divmod(num_experts, ranks)
        return cls.of_counts([each + (rank < more) for rank in range(ranks)])

    @classmethod
    def of_counts(cls, counts: Sequence[int]) -> Placement:
        """Runs of experts, as long as ``counts`` says for each rank."""
        ends = itertools.accumulate(counts, initial=0)
        return cls(tuple(tuple(range(a, b)) for a, b in itertools.pairwise(ends)))

    @property
    def num_experts(self) -> int:
        """E, of all ranks together, copies counted once."""
        return 1 + max(expert for rank in self.experts for expert in rank)

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return len(self.experts)

    @property
    def places(self) -> int:
        """Places of a rank: the most experts that one has. Place p of rank r is number r * places + p."""
        return max(map(len, self.experts))

    @property
    def copies(self) -> int:
        """The most copies of an expert."""
        everywhere = [expert for rank in self.experts for expert in rank]
        return max(everywhere.count(expert) for expert in set(everywhere))

    def table(self, device: torch.device) -> Places:
        """Places of each expert's copies."""
        places: list[list[int]] = [[] for _ in range(self.num_experts)]
        for rank, experts in enumerate(self.experts):
            for place, expert in enumerate(experts):
                places[expert].append(rank * self.places + place)
        most = self.copies
        rows = [[*at, *at[:1] * (most - len(at))] for at in places] + [[-1] * most]
        return Places(
            torch.tensor(rows, dtype=torch.int32, device=device),
            torch.tensor([*map(len, places), 1], dtype=torch.int32, device=device),
            self.ranks,
            self.places,
        )

    def expert_map(self, rank: int, device: torch.device) -> Tensor:
        """[ranks * places] int32: place -> the rank's own expert there, or -1."""
        where = torch.full((self.ranks * self.places,), -1, dtype=torch.int32)
        start, count = rank * self.places, len(self.experts[rank])
        where[start : start + count] = torch.arange(count, dtype=torch.int32)
        return where.to(device)
