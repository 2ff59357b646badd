"""Which rank holds which experts, and which copy of an expert a slot goes to."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedmoe.backends.base import Places
from fusedmoe.errors import OptionError, explain, require_integer

#: Far more experts, or ranks, than there are.
MOST = 2**20


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
        wanted = "every expert of 0 .. E - 1 on some rank, on none twice"
        do = "See Placement.contiguous for the usual one."
        try:
            ranks = tuple(tuple(rank) for rank in self.experts)
        except TypeError as error:
            raise OptionError(explain("placement", got=repr(self.experts), wanted=wanted, do=do)) from error
        object.__setattr__(self, "experts", ranks)
        everywhere = [expert for rank in ranks for expert in rank]
        if not everywhere or not all(isinstance(e, int) and e >= 0 and not isinstance(e, bool) for e in everywhere):
            raise OptionError(explain("placement", got=ranks, wanted=wanted, do=do))
        present = set(everywhere)
        missing = next(e for e in range(len(present) + 1) if e not in present)  # E, if none of 0 .. E - 1 is
        if missing < len(present):
            raise OptionError(explain("placement", got=f"no rank with expert {missing}", wanted=wanted, do=do))
        for number, rank in enumerate(ranks):
            if len(set(rank)) < len(rank):
                raise OptionError(explain(f"placement of rank {number}", got=rank, wanted=wanted, do=do))

    @classmethod
    def contiguous(cls, num_experts: int, ranks: int) -> Placement:
        """Runs of experts, the first ``num_experts % ranks`` ranks with one more."""
        for name, value in (("num_experts", num_experts), ("ranks", ranks)):
            require_integer(name, value, 1, MOST, do="Pass the model's experts and the group's size.")
        each, more = divmod(num_experts, ranks)
        return cls.of_counts([each + (rank < more) for rank in range(ranks)])

    @classmethod
    def of_counts(cls, counts: Sequence[int]) -> Placement:
        """Runs of experts, as long as ``counts`` says for each rank."""
        if not isinstance(counts, Sequence):
            do = "Pass how many experts each rank has."
            raise OptionError(explain("counts", got=repr(counts), wanted="a sequence of integers", do=do))
        for rank, count in enumerate(counts):
            require_integer(f"count of rank {rank}", count, 0, MOST, do="Pass how many experts the rank has.")
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
