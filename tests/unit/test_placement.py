"""Where experts are, and where tokens go."""

from __future__ import annotations

import pytest
import torch

from fusedmoe import backends
from fusedmoe.errors import OptionError
from fusedmoe.parallel import Placement

HOT = Placement(((0, 1, 2, 8), (3, 4, 8), (5, 6), (7, 8)))


@pytest.mark.parametrize("capacity", [None, 11])
def test_a_token_goes_to_a_rank_once(capacity):
    torch.manual_seed(0)
    table = Placement.contiguous(12, 4).table(torch.device("cpu"))
    places = torch.randint(-2, 13, (11, 5))
    found = backends.load_transit("torch").sends(places, table, 2, capacity)
    places = places.masked_fill(places >= 12, -1)
    tokens = [[t for t in range(11) if any(p >= 0 and p // 3 == r for p in places[t].tolist())] for r in range(4)]
    assert found.counts.tolist() == [len(one) for one in tokens]
    starts = [sum(map(len, tokens[:r])) if capacity is None else r * capacity for r in range(4)]
    for start, one in zip(starts, tokens, strict=True):
        assert found.token[start : start + len(one)].tolist() == one
    assert found.token.min() >= 0 and found.token.max() < 11
    for t in range(11):
        seen = []
        for j, place in enumerate(places[t].tolist()):
            rank = place // 3
            if place < 0 or rank in seen:
                assert found.answer[t, j] == -1
            else:
                seen.append(rank)
                assert found.answer[t, j] == starts[rank] + tokens[rank].index(t)


def test_copies_are_chosen_evenly_and_alike_in_every_run():
    table = HOT.table(torch.device("cpu"))
    ids = torch.full((3000, 1), 8)

    def choose(ids, rank):
        return backends.load_transit("torch").sends(ids, table, rank, None).places

    for stride in (1, 2, 3, 6):  # whichever tokens an expert gets
        places = choose(ids, 0)[::stride]
        counts = torch.bincount(places.flatten() // HOT.places, minlength=4)
        assert counts[2] == 0
        share_of_each = counts[[0, 1, 3]] / places.numel()
        assert (share_of_each - 1 / 3).abs().max() < 0.05
    assert torch.equal(choose(ids, 1), choose(ids, 1))
    assert (choose(ids, 1) != choose(ids, 0)).any(), "ranks do not all start with the same copy"
    single = choose(torch.tensor([[5, -1, 9, 2**40]]), 3)
    assert single.tolist() == [[2 * HOT.places, -1, -1, -1]]


@pytest.mark.parametrize(
    ("experts", "words"),
    [
        ((), ["placement", "every expert"]),
        (((0, 2),), ["no rank with expert 1"]),
        (((0, 2**70),), ["no rank with expert 1"]),
        (((0, 1), (1, 1)), ["rank 1", "(1, 1)"]),
        (((0, -1),), ["placement", "-1"]),
    ],
)
def test_placements_that_are_none(experts, words):
    with pytest.raises(OptionError) as raised:
        Placement(experts)
    for word in [*words, "got", "wanted"]:
        assert word in str(raised.value)


def test_contiguous_placements_are_even():
    assert Placement.contiguous(7, 3).experts == ((0, 1, 2), (3, 4), (5, 6))
    assert Placement.contiguous(2, 4).experts == ((0,), (1,), (), ())
