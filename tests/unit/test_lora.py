"""Adapters: their definition against merged weights, the torch backend against the definition, slots, and errors."""

from __future__ import annotations

import pytest
import torch

import fusedmoe
from fusedmoe import Adapter, LoRA, reference
from fusedmoe.schemes import SCHEMES, format_of
from fusedmoe.spec.activation import Activation
from fusedmoe.testing.cases import OPTIONS, Case, pairwise, run_poisoned
from fusedmoe.testing.verify import TOLERANCE, relative_error

#: Options of adapters, for a pairwise grid.
ADAPTERS = {
    "ranks": ((1,), (3, 0, 8), (16, 16, 5, 0), (64,), (200, 3)),
    "apart": (True, False, "tensors"),
    "shared": (False, True),
}
SHAPES = [(1, 2, 5, 33, 80), (9, 3, 4, 64, 48), (70, 2, 3, 32, 40)]
GRID = pairwise({"shape": SHAPES, **OPTIONS, **ADAPTERS})


def merged(arguments, options, slot, case):
    """The layer of one adapter: float64 weights with ``scaling B A`` added."""
    x, w13, w2, weights, ids = arguments
    lora, options = options["lora"], {k: v for k, v in options.items() if k not in ("lora", "adapter_ids")}
    rank = int(lora.rank[slot])
    if case.weight_layout == "KN":
        w13, w2 = w13.transpose(1, 2), w2.transpose(1, 2)
    a13, b13 = lora.w13_a, lora.w13_b
    if lora.up_a is not None:
        a13, b13 = torch.cat([a13, lora.up_a], 2), torch.empty_like(b13).repeat(1, 1, 2, 1)
        up = slice(1, None, 2) if case.gate_up_layout == "interleaved" else slice(case.intermediate, None)
        gate = slice(0, None, 2) if case.gate_up_layout == "interleaved" else slice(0, case.intermediate)
        b13[:, :, gate], b13[:, :, up] = lora.w13_b, lora.up_b
    a13, b13, a2, b2 = (t[slot].double().expand(case.experts, -1, -1) for t in (a13, b13, lora.w2_a, lora.w2_b))
    b13, a2, b2 = b13[:, :, :rank], a2[:, :rank], b2[:, :, :rank]
    halves = a13.unflatten(1, (lora.parts, lora.max_rank))[:, :, :rank]
    delta = b13 @ halves[:, 0]
    if lora.parts == 2:
        up = slice(1, None, 2) if case.gate_up_layout == "interleaved" else slice(case.intermediate, None)
        delta[:, up] = (b13 @ halves[:, 1])[:, up]
    scaling = float(lora.scaling[slot])
    w13, w2 = w13.double() + scaling * delta, w2.double() + scaling * b2 @ a2
    options["weight_layout"] = "NK"
    return reference.fused_experts(x, w13, w2, weights, ids, **options)


@pytest.mark.parametrize("row", range(len(GRID)))
def test_the_definition_is_that_of_merged_weights(row):
    case = Case.of(**GRID[row])
    arguments, options = case.draw(seed=row)
    want = reference.fused_experts(*arguments, **{k: v for k, v in options.items() if k not in ("lora", "adapter_ids")})
    for slot, rank in enumerate(case.ranks):
        if rank:
            mine = options["adapter_ids"] == slot
            want[mine] = merged(arguments, options, slot, case)[mine]
    assert relative_error(reference.fused_experts(*arguments, **options), want) < 1e-12


@pytest.mark.parametrize("row", range(len(GRID)))
def test_option_grid(row):
    case = Case.of(**GRID[row])
    _, error = run_poisoned(case, backend="torch", seed=row)
    assert error < TOLERANCE[case.dtype], case


@pytest.mark.parametrize("scheme", SCHEMES)
def test_schemes(scheme):
    for dtype in ("float32", "bfloat16"):
        case = Case.of((20, 2, 4, 128, 128), formats=(format_of(scheme),) * 2, dtype=dtype, ranks=(8, 0, 3)).fitted()
        _, error = run_poisoned(case, backend="torch")
        assert error < case.tolerance, case


def without(options):
    return {name: value for name, value in options.items() if name not in ("lora", "adapter_ids")}


def test_rows_without_an_adapter_keep_their_bits():
    for dtype in ("float32", "bfloat16"):
        arguments, options = Case.of((40, 2, 4, 64, 48), dtype=dtype, ranks=(8, 3), bias=True).draw()
        out = fusedmoe.fused_experts(*arguments, backend="torch", **options)
        base = fusedmoe.fused_experts(*arguments, backend="torch", **without(options))
        none = (options["adapter_ids"] < 0) | (options["adapter_ids"] > 1)
        assert 0 < none.sum() < 40
        assert torch.equal(out[none], base[none])
        assert not torch.isclose(out[~none], base[~none]).all(1).any()
        options["adapter_ids"] = None
        assert torch.equal(fusedmoe.fused_experts(*arguments, backend="torch", **options), base)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int32])
def test_an_adapter_that_is_not_enabled_is_none(dtype):
    arguments, options = Case.of((40, 2, 4, 64, 48), dtype="float32", ranks=(8, 3)).draw()
    lora = options["lora"]
    mask = torch.tensor([1, 0], dtype=dtype)
    options["lora"] = LoRA(
        lora.w13_a, lora.w13_b, lora.w2_a, lora.w2_b, scaling=lora.scaling, rank=lora.rank, adapter_enabled=mask
    )
    out = fusedmoe.fused_experts(*arguments, backend="torch", **options)
    assert relative_error(out, reference.fused_experts(*arguments, **options)) < TOLERANCE["float32"]
    base = fusedmoe.fused_experts(*arguments, backend="torch", **without(options))
    second = options["adapter_ids"] == 1
    assert second.any() and torch.equal(out[second], base[second])
    mask[1] = 1  # the caller's tensor is used where it lies
    again = fusedmoe.fused_experts(*arguments, backend="torch", **options)
    assert not torch.equal(again[second], base[second])
    assert relative_error(again, reference.fused_experts(*arguments, **options)) < TOLERANCE["float32"]


def an_adapter(rank, *, experts=4, hidden=64, intermediate=48, parts=2, seed=0, **options):
    g = torch.Generator().manual_seed(seed)
    shapes = (parts * rank, hidden), (2 * intermediate, rank), (rank, intermediate), (hidden, rank)
    names = ("w13_a", "w13_b", "w2_a", "w2_b")
    made = {name: torch.randn(experts, *s, generator=g) * s[1] ** -0.5 for name, s in zip(names, shapes, strict=True)}
    return Adapter(**made, **options)


def test_slots_are_filled_and_emptied_in_place():
    arguments, _ = Case.of((40, 2, 4, 64, 48), dtype="float32").draw()
    ids = torch.arange(40) % 3
    one, two, three = an_adapter(8, scaling=0.5), an_adapter(3, seed=1, parts=1, scaling=2.0), an_adapter(16, seed=2)
    lora = LoRA.empty(3, num_experts=4, hidden_size=64, intermediate_size=48, max_rank=16)
    where = [t.data_ptr() for t in (lora.w13_a, lora.w13_b, lora.w2_a, lora.w2_b, lora.rank, lora.scaling)]

    def same_as(*adapters):
        """Each alone in slots of its own."""
        want = reference.fused_experts(*arguments)
        for slot, adapter in enumerate(adapters):
            if adapter is not None:
                only = torch.where(ids == slot, 0, -1)
                want[ids == slot] = reference.fused_experts(*arguments, lora=LoRA.of([adapter]), adapter_ids=only)[
                    ids == slot
                ]
        out = fusedmoe.fused_experts(*arguments, lora=lora, adapter_ids=ids, backend="torch")
        return relative_error(out, want) < TOLERANCE["float32"]

    assert same_as(None, None, None)
    lora.add(0, one)
    lora.add(2, two)
    assert same_as(one, None, two)
    lora.remove(0)
    lora.add(1, three)
    assert same_as(None, three, two)
    lora.add(2, one)
    assert same_as(None, three, one)
    assert where == [t.data_ptr() for t in (lora.w13_a, lora.w13_b, lora.w2_a, lora.w2_b, lora.rank, lora.scaling)]


def test_slots_that_are_finite_stay_so():
    """What is not is refused before anything is written; so is what is not any more in the type of the slots."""
    lora = LoRA.empty(2, num_experts=2, hidden_size=8, intermediate_size=8, max_rank=2, dtype=torch.float16)
    assert lora.finite and all(t.isfinite().all() for t in lora.tensors())
    sizes = {"w13_a": (2, 2, 8), "w13_b": (2, 16, 2), "w2_a": (2, 2, 8), "w2_b": (2, 8, 2)}
    good = {name: torch.ones(size) for name, size in sizes.items()}
    lora.add(0, Adapter(**good))
    before = [tensor.clone() for tensor in lora.tensors()]
    for name in sizes:
        for value in (float("nan"), float("inf"), 1e30):
            bad = {**good, name: good[name].clone()}
            bad[name][1, 1, 1] = value
            with pytest.raises(fusedmoe.OptionError, match="adapter in torch.float16: got an infinity or NaN"):
                lora.add(0, Adapter(**bad))
    assert all(map(torch.equal, before, lora.tensors()))
    given = LoRA(*lora.tensors()[:4])
    assert not given.finite
    given.add(0, Adapter(**{**good, "w2_b": torch.full((2, 8, 2), float("nan"))}))


def test_slots_of_several_adapters():
    adapters = [an_adapter(3), an_adapter(8, seed=1, parts=1)]
    lora = LoRA.of(adapters, slots=4)
    assert (lora.slots, lora.max_rank, lora.parts, lora.rank.tolist()) == (4, 8, 2, [3, 8, 0, 0])
    assert torch.equal(lora.w13_a[1, :, :8], lora.w13_a[1, :, 8:])  # one A serves gate and up


@pytest.mark.parametrize("layout", ["concatenated", "interleaved"])
def test_slices_of_the_intermediate_add_up_to_the_layer(layout):
    """Tensor parallelism: every rank has a slice of I of w13, w2, B of w13 and A of w2, and no other part is cut."""
    case = Case.of((20, 2, 4, 64, 48), dtype="float32", gate_up_layout=layout, ranks=(8, 3))
    (x, w13, w2, weights, ids), options = case.draw()
    lora = options.pop("lora")
    want = reference.fused_experts(x, w13, w2, weights, ids, lora=lora, **options)
    total = torch.zeros_like(want)
    for start, stop in ((0, 16), (16, 48)):

        def cut(rows, start=start, stop=stop):
            if layout == "interleaved":
                return rows[..., 2 * start : 2 * stop, :]
            return torch.cat([rows[..., start:stop, :], rows[..., 48 + start : 48 + stop, :]], -2)

        part = LoRA(
            lora.w13_a, cut(lora.w13_b), lora.w2_a[..., start:stop], lora.w2_b, scaling=lora.scaling, rank=lora.rank
        )
        total += fusedmoe.fused_experts(
            x, cut(w13), w2[..., start:stop], weights, ids, lora=part, backend="torch", **options
        )
    assert relative_error(total, want) < 2 * TOLERANCE["float32"]


def test_the_module_takes_adapters():
    arguments, options = Case.of((12, 2, 4, 64, 48), dtype="float32", ranks=(8, 3)).draw()
    x, w13, w2, weights, ids = arguments
    layer = fusedmoe.FusedExperts.of(w13, w2)
    lora, adapter_ids = options["lora"], options["adapter_ids"]
    out = layer(
        x.view(3, 4, -1), weights.view(3, 4, -1), ids.view(3, 4, -1), lora=lora, adapter_ids=adapter_ids.view(3, 4)
    )
    assert relative_error(out.flatten(0, 1), reference.fused_experts(*arguments, **options)) < TOLERANCE["float32"]


@pytest.mark.parametrize("apart", [True, "tensors"])
def test_torch_compile_keeps_adapters(apart):
    arguments, options = Case.of((12, 2, 4, 64, 48), dtype="float32", ranks=(8, 3), apart=apart).draw()
    lora = options["lora"]

    @torch.compile(fullgraph=True, backend="eager")
    def compiled(x, w13, w2, weights, ids, adapter_ids):
        return fusedmoe.fused_experts(x, w13, w2, weights, ids, lora=lora, adapter_ids=adapter_ids)

    with torch.no_grad():
        out = compiled(*arguments, options["adapter_ids"])
    assert relative_error(out, reference.fused_experts(*arguments, **options)) < TOLERANCE["float32"]


def test_workspace_bytes_knows_adapters():
    arguments, options = Case.of((40, 2, 4, 64, 48), ranks=(8,)).draw()
    assert fusedmoe.workspace_bytes(*arguments, backend="torch", **options) == 0


LAYER = {"num_experts": 4, "hidden_size": 64, "intermediate_size": 48, "max_rank": 8}


def stacked(w2_a="cpu", dtype=None):
    """Four matrices that fit each other: 2 slots, E = 4, R = 8, H = 64, I = 48."""
    devices = ("cpu", "cpu", w2_a, "cpu")
    shapes = ((8, 64), (96, 8), (8, 48), (64, 8))
    return [torch.zeros(2, 4, *s, dtype=dtype, device=d) for s, d in zip(shapes, devices, strict=True)]


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: LoRA.empty(0, **LAYER), fusedmoe.ShapeError, r"w13_a: got \(0, 4, 16, 64\)"),
        (lambda: LoRA.empty(2, **{**LAYER, "max_rank": 300}), fusedmoe.ShapeError, "rank of 1 to 256"),
        (lambda: LoRA.empty(2000, **LAYER), fusedmoe.ShapeError, "at most 1024 slots"),
        (lambda: LoRA.empty(2, **LAYER).add(2, an_adapter(8)), fusedmoe.OptionError, "slot: got 2; wanted 0 to 1"),
        (lambda: LoRA.empty(2, **LAYER).remove(-1), fusedmoe.OptionError, "slot: got -1"),
        (lambda: LoRA.empty(2, **LAYER).add(0, an_adapter(16)), fusedmoe.ShapeError, "at most 8.*max_rank=16"),
        (
            lambda: LoRA.empty(2, apart=False, **LAYER).add(0, an_adapter(8)),
            fusedmoe.ShapeError,
            "one A for both. .*apart=True",
        ),
        (
            lambda: LoRA.empty(2, **LAYER).add(0, an_adapter(8, hidden=32)),
            fusedmoe.ShapeError,
            "w13_a of the adapter: .*of one layer",
        ),
        (lambda: LoRA.of([]), fusedmoe.OptionError, "0 adapters"),
        (
            lambda: LoRA(*(torch.zeros(2, 4, *s) for s in ((8, 64), (96, 8), (8, 48), (64, 4)))),
            fusedmoe.ShapeError,
            "w2_b of LoRA: got w13_a",
        ),
        (
            lambda: LoRA(*(torch.zeros(2, e, *s) for e, s in ((4, (8, 64)), (4, (96, 8)), (3, (8, 48)), (4, (64, 8))))),
            fusedmoe.ShapeError,
            "each with E or 1",
        ),
        (
            lambda: LoRA(*stacked(dtype=torch.int8)),
            fusedmoe.DTypeError,
            "w13_a of LoRA: got torch.int8",
        ),
        (
            lambda: LoRA(*stacked(), rank=torch.ones(3).int()),
            fusedmoe.ShapeError,
            "rank of LoRA: .*one for each slot",
        ),
        (
            lambda: LoRA(*stacked(w2_a="meta")),
            fusedmoe.DeviceError,
            "w2_a of LoRA: got a tensor on meta",
        ),
    ],
)  # fmt: skip
def test_errors_of_slots(make, error, says):
    with pytest.raises(error, match=says):
        make()


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"lora": object()}, fusedmoe.DTypeError, "lora: got object; wanted a fusedmoe.LoRA"),
        ({"adapter_ids": torch.zeros(5).int()}, fusedmoe.ShapeError, r"adapter_ids: got shape \(5,\)"),
        ({"adapter_ids": torch.zeros(40)}, fusedmoe.DTypeError, "adapter_ids: got torch.float32"),
        ({"lora": LoRA.of([an_adapter(8, experts=3)])}, fusedmoe.ShapeError, r"lora: got shape \(3, 96, 64, 48\)"),
        ({"lora": LoRA.of([an_adapter(8, intermediate=32)])}, fusedmoe.ShapeError, "of this layer and this shard"),
        (
            {"lora": LoRA.empty(1, dtype=torch.float16, **LAYER)},
            fusedmoe.DTypeError,
            "matrices of lora: got torch.float16; wanted float32",
        ),
    ],
)
def test_errors_of_a_call(change, error, says):
    arguments, options = Case.of((40, 2, 4, 64, 48), dtype="float32", ranks=(8,)).draw()
    with pytest.raises(error, match=says):
        fusedmoe.fused_experts(*arguments, **{**options, **change})


def test_adapters_do_not_meet_codes():
    case = Case.of((40, 2, 4, 64, 48), formats=(format_of("int8_w8a8"), None), codes=True, ranks=(8,))
    arguments, options = case.draw()
    with pytest.raises(fusedmoe.OptionError, match="lora with hidden_states_scale: .*before"):
        fusedmoe.fused_experts(*arguments, **options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_autocast_changes_nothing(dtype):
    arguments, options = Case.of((40, 2, 4, 64, 48), dtype=dtype, ranks=(8,), apart=True).draw()
    want = fusedmoe.fused_experts(*arguments, backend="torch", **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = fusedmoe.fused_experts(*arguments, backend="torch", **options)
    assert torch.equal(got, want)


def test_parameters_in_a_slot_are_numbers():
    """What was trained does not make the slots of others a part of its graph."""
    lora = LoRA.of([an_adapter(8), an_adapter(8)])
    adapter = an_adapter(4)
    trained = {name: torch.nn.Parameter(getattr(adapter, name)) for name in ("w13_a", "w13_b", "w2_a", "w2_b")}
    lora.add(1, Adapter(**trained))
    assert not any(tensor.requires_grad for tensor in lora.tensors())
    assert torch.equal(lora.w2_b[1, ..., :4], trained["w2_b"])


@pytest.mark.parametrize("scaling", [float("nan"), float("inf"), "1", None, True])
def test_a_scaling_is_a_finite_number(scaling):
    lora, adapter = LoRA.of([an_adapter(8)]), an_adapter(4)
    before = lora.w13_a.clone()
    object.__setattr__(adapter, "scaling", scaling)
    with pytest.raises(fusedmoe.OptionError, match="scaling of the adapter: got .* wanted a finite number"):
        lora.add(0, adapter)
    assert torch.equal(lora.w13_a, before)


def test_adapters_have_no_gradient():
    arguments, options = Case.of((40, 2, 4, 64, 48), dtype="float32", ranks=(8,)).draw()
    options["lora"].w2_b = options["lora"].w2_b.clone().requires_grad_()
    with pytest.raises(fusedmoe.GradientError, match="w2_b requires grad"):
        fusedmoe.fused_experts(*arguments, **options)


FAULTS = {
    "no adapters": lambda o: {**o, "lora": None},
    "the next slot": lambda o: {**o, "adapter_ids": (o["adapter_ids"] + 1) % 2},
    "without scaling": lambda o: {**o, "lora": changed(o["lora"], scaling=torch.ones(2))},
    "gate and up swapped": lambda o: {**o, "lora": changed(o["lora"], w13_a=o["lora"].w13_a.roll(11, 2))},
    "half of the rank": lambda o: {**o, "lora": changed(o["lora"], rank=o["lora"].rank // 2)},
    "expert off by one": lambda o: {**o, "lora": changed(o["lora"], w2_b=o["lora"].w2_b.roll(1, 1))},
}


def changed(lora, **change):
    names = ("w13_a", "w13_b", "w2_a", "w2_b", "scaling", "rank")
    return LoRA(**{name: change.get(name, getattr(lora, name)) for name in names})


@pytest.mark.parametrize("fault", FAULTS)
def test_the_bound_rejects_planted_faults(fault):
    arguments, options = Case.of((40, 2, 4, 96, 64), ranks=(8, 6), activation=Activation("gelu")).draw()
    want = reference.fused_experts(*arguments, **options)
    out = fusedmoe.fused_experts(*arguments, backend="torch", **FAULTS[fault](options))
    assert not relative_error(out, want) < 10 * TOLERANCE["bfloat16"]
