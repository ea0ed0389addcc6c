import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afpq.errors import PlanError
from afpq.formats import AfpFormat, all_formats
from afpq.packing import packed_bytes
from afpq.plan import (
    Option,
    Plan,
    PlanEntry,
    allocate,
    check_plan,
    match_names,
    parse_overrides,
    storage_bits,
)

ENTRY = PlanEntry(
    ("conv1", "conv1b"), "w1", 32, 27, AfpFormat(2, 2), error=1.5, predicted_loss=0.25
)
PLAN = Plan(
    (ENTRY, PlanEntry(("head",), "w2", 10, 64, None)),
    budget=5.0,
    objective="kl",
)


def option_groups() -> st.SearchStrategy[list[list[Option]]]:
    option = st.builds(Option, st.integers(1, 2000), st.floats(0, 1e3, allow_subnormal=False))
    return st.lists(st.lists(option, min_size=1, max_size=4), min_size=1, max_size=5)


@settings(deadline=None, max_examples=50)
@given(option_groups(), st.floats(0, 1))
def test_allocate_is_as_good_as_brute_force(groups: list[list[Option]], share: float) -> None:
    smallest = sum(min(o.storage_bits for o in g) for g in groups)
    largest = sum(max(o.storage_bits for o in g) for g in groups)
    budget = smallest + int(share * (largest - smallest))

    choice = allocate(groups, budget)

    chosen = [g[j] for g, j in zip(groups, choice, strict=True)]
    assert sum(o.storage_bits for o in chosen) <= budget
    best = min(
        math.fsum(o.loss for o in combination)
        for combination in itertools.product(*groups)
        if sum(o.storage_bits for o in combination) <= budget
    )
    assert math.fsum(o.loss for o in chosen) <= best * (1 + 1e-6) + 1e-12


@pytest.mark.parametrize("budget", [4.0, 5.0, 6.3])
def test_allocate_is_exact_where_losses_span_many_orders(budget: float) -> None:
    rng = np.random.default_rng(7)
    sizes = rng.integers(100, 5000, 6)
    groups = [
        [Option(int(n * b), float(s * 4.0**-b)) for b in (2, 3, 4, 6, 8)]
        for n, s in zip(sizes, 10.0 ** rng.uniform(-9, 3, 6), strict=True)
    ]
    limit = int(budget * sizes.sum())

    choice = allocate(groups, limit)

    combinations = itertools.product(*groups)
    best = min(
        math.fsum(o.loss for o in c)
        for c in combinations
        if sum(o.storage_bits for o in c) <= limit
    )
    assert math.fsum(g[j].loss for g, j in zip(groups, choice, strict=True)) <= best * (1 + 1e-6)


def test_allocate_is_deterministic_and_silent(capfd: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    groups = [
        [Option(int(n * b + rng.integers(0, 99)), float(s * 4.0**-b)) for b in range(2, 9)]
        for n, s in zip(rng.integers(100, 90000, 80), rng.random(80), strict=True)
    ]
    budget = sum(g[3].storage_bits for g in groups)

    first, second = allocate(groups, budget), allocate(groups, budget)

    assert first == second
    assert capfd.readouterr() == ("", "")


def test_allocate_takes_the_best_of_each_group_when_the_budget_is_large() -> None:
    groups = [[Option(8, 3.0), Option(9, 1.0), Option(10, 2.0)], [Option(5, 0.0), Option(4, 0.0)]]
    assert allocate(groups, 10**12) == [1, 1]


@pytest.mark.parametrize(
    "groups, budget, message",
    [
        ([[Option(10, 0.0)], [Option(20, 0.0)]], 29, "29 bits is too small: 30 is the minimum"),
        ([[Option(10, 0.0)], []], 29, "group 1 has no option"),
        ([[Option(10, math.nan)]], 29, "group 0 has a loss that is not finite"),
    ],
)
def test_allocate_refuses_what_it_cannot_do(
    groups: list[list[Option]], budget: int, message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        allocate(groups, budget)


def test_storage_bits_counts_padding_and_scales() -> None:
    fmt = AfpFormat(2, 2)
    assert storage_bits(20, 9, fmt, "real", "per_channel") == 8 * packed_bytes(20, 9, 5) + 20 * 16
    assert storage_bits(20, 9, fmt, "integer", "per_channel") == 32 * 12 * 5 + 20 * 8
    assert storage_bits(20, 9, fmt, "real", "per_tensor") == 32 * 12 * 5 + 16


def test_bits_per_weight_is_over_quantized_layers_only() -> None:
    assert PLAN.bits_per_weight == ENTRY.storage_bits / (32 * 27)
    assert PLAN.entries[1].storage_bits == 32 * 640
    assert PLAN.predicted_loss == 0.25
    assert Plan(PLAN.entries[1:], None, "none").bits_per_weight == 32


def test_json_is_canonical() -> None:
    text = PLAN.to_json()

    assert text == (
        "{\n"
        '  "spec_version": 1,\n'
        '  "objective": "kl",\n'
        '  "budget": 5.0,\n'
        '  "bits_per_weight": 5.77777778,\n'
        '  "predicted_loss": 0.25,\n'
        '  "entries": [\n'
        '    {"layers": ["conv1", "conv1b"], "weight_name": "w1", "shape": [32, 27], "format": "e2m2", '
        '"kind": "real", "granularity": "per_channel", "storage_bits": 4992, '
        '"bits_per_weight": 5.77777778, "error": 1.5, "predicted_loss": 0.25},\n'
        '    {"layers": ["head"], "weight_name": "w2", "shape": [10, 64], "format": "float", '
        '"kind": "real", "granularity": "per_channel", "storage_bits": 20480, '
        '"bits_per_weight": 32.0, "error": null, "predicted_loss": null}\n'
        "  ]\n"
        "}\n"
    )
    assert Plan.from_json(text) == PLAN


entries = st.builds(
    PlanEntry,
    layers=st.lists(st.text(), min_size=1, max_size=2, unique=True).map(tuple),
    weight_name=st.text(min_size=1),
    n=st.integers(1, 99),
    k=st.integers(1, 99),
    format=st.none() | st.sampled_from(all_formats()),
    kind=st.sampled_from(["real", "integer"]),
    granularity=st.sampled_from(["per_channel", "per_tensor"]),
    error=st.none() | st.floats(0, 1e30),
    predicted_loss=st.none() | st.floats(0, 1e30),
)


@given(entries, st.none() | st.floats(0.1, 32))
def test_reading_and_writing_is_stable(entry: PlanEntry, budget: float | None) -> None:
    text = Plan((entry,), budget, "kl").to_json()

    again = Plan.from_json(text)

    assert again.to_json() == text
    assert again.plan_hash == Plan.from_json(again.to_json()).plan_hash
    assert len(again.plan_hash) == 64
    assert again.entries[0].format == entry.format


def edited(change: dict[str, object], *, entry: bool = True) -> str:
    document = json.loads(PLAN.to_json())
    (document["entries"][0] if entry else document).update(change)
    return json.dumps(document)


def test_reading_a_plan_keeps_the_hash_of_losses_with_many_digits() -> None:
    losses = [0.1234567894321 + 1e-10 * i for i in range(40)]
    entries = [
        PlanEntry((f"l{i}",), f"w{i}", 16, 16, AfpFormat(2, 1), predicted_loss=loss)
        for i, loss in enumerate(losses)
    ]
    plan = Plan(tuple(entries), 4.0, "kl")

    assert Plan.from_json(plan.to_json()).plan_hash == plan.plan_hash


def test_an_edited_format_is_respected_and_loses_its_predictions() -> None:
    entry = Plan.from_json(edited({"format": "e0m5"})).entries[0]

    assert entry.format == AfpFormat(0, 5)
    assert entry.storage_bits == storage_bits(32, 27, AfpFormat(0, 5), "real", "per_channel")
    assert entry.predicted_loss is None and entry.error is None


def test_a_layer_is_set_to_float_by_hand() -> None:
    plan = Plan.from_json(edited({"format": "float"}))
    assert plan.entries[0].format is None
    assert plan.bits_per_weight == 32


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format": "e9m1"}, "plan entry 'w1': exponent_bits 9"),
        ({"format": "ue2m2"}, "plan entry 'w1': weights need a signed format"),
        ({"format": 5}, "plan entry 'w1': format 5 is not a text"),
        ({"kind": "exact"}, "plan entry 'w1': kind 'exact' is not one of real, integer"),
        ({"granularity": "per_row"}, "plan entry 'w1': granularity 'per_row' is not one of"),
        ({"shape": [32]}, r"plan entry 'w1': shape \[32\] is not \[n, k\]"),
        ({"shape": [0, 3]}, r"plan entry 'w1': shape \[0, 3\] is not positive"),
        ({"shape": [True, 3]}, "plan entry 'w1': shape"),
        ({"layers": []}, "plan entry 'w1': layers must name at least one"),
        ({"layers": "conv1"}, "plan entry 'w1': layers is not a list"),
        ({"layers": ["head"]}, "plan entry 'w2': layer 'head' is in another entry too"),
        ({"weight_name": "w2"}, "plan entry 'w2' occurs twice"),
        ({"weight_name": ""}, "plan entry 0: weight_name '' is not a text"),
        ({"formt": "e2m2"}, "plan entry 'w1': unknown field 'formt'; nearest: format"),
        ({"error": -1.0}, "plan entry 'w1': error -1.0 is not a finite number"),
        ({"predicted_loss": "low"}, "plan entry 'w1': predicted_loss 'low' is not a number"),
    ],
)
def test_a_bad_entry_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan.from_json(edited(change))


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "the plan is not JSON"),
        ("[]", "the plan is not a JSON object"),
        ("{}", "plan: field 'spec_version' is missing"),
        (edited({"spec_version": 2}, entry=False), "spec_version 2, this afpq reads 1"),
        (edited({"budget": "5"}, entry=False), "plan: budget '5' is not a number"),
        (edited({"entries": {}}, entry=False), "plan: entries is not a list"),
        (edited({"entries": [1]}, entry=False), "plan entry 0 is not a JSON object"),
        (edited({"entires": []}, entry=False), "plan: unknown field 'entires'; nearest: entries"),
    ],
)
def test_a_bad_document_is_refused(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan.from_json(text)


def test_patterns_match_names_and_globs() -> None:
    names = ["/block.0/conv", "/block.1/conv", "head[0]"]
    assert match_names(["/block.*", "head[0]"], names, "--include") == {
        "/block.*": names[:2],
        "head[0]": ["head[0]"],  # an exact name goes before its reading as a glob
    }


def test_a_pattern_that_matches_nothing_lists_the_nearest_names() -> None:
    with pytest.raises(PlanError, match=r"--exclude 'hed\*' matches no layer; nearest: head"):
        match_names(["hed*"], ["conv1", "head"], "--exclude")
    with pytest.raises(PlanError, match=r"nearest: a1, b2, c3, \.\.\.$"):
        match_names(["zzzz"], ["a1", "b2", "c3", "d4"], "--layer")


def test_overrides_are_parsed_in_order() -> None:
    assert list(parse_overrides(["a*=e2m2", "b=c=float", "a*=e0m3"]).items()) == [
        ("b=c", "float"),
        ("a*", "e0m3"),
    ]
    for text, message in (
        ("conv1", "is not GLOB=FORMAT"),
        ("=e2m1", "is not GLOB=FORMAT"),
        ("conv1=e7m1", "exponent_bits 7"),
        ("conv1=ue2m2", "signed"),
    ):
        with pytest.raises(PlanError, match=message):
            parse_overrides([text])


@pytest.mark.parametrize(
    "shapes, message",
    [
        ({"conv1": ("w1", 32, 27)}, "'w1': the model has no layer 'conv1b'; nearest: conv1"),
        (
            {"conv1": ("w1", 32, 27), "conv1b": ("w9", 32, 27)},
            "'w1': layer 'conv1b' has the weight 'w9'",
        ),
        (
            {"conv1": ("w1", 32, 25), "conv1b": ("w1", 32, 25)},
            r"layer 'conv1' is \[32, 25\], the plan says \[32, 27\]",
        ),
    ],
)
def test_a_plan_of_another_model_is_refused(
    shapes: dict[str, tuple[str, int, int]], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        check_plan(PLAN, shapes)


def test_a_plan_of_the_model_is_accepted() -> None:
    shapes = {"conv1": ("w1", 32, 27), "conv1b": ("w1", 32, 27), "head": ("w2", 10, 64)}
    check_plan(PLAN, shapes | {"more": ("w3", 1, 1)})


def test_a_frontier_is_kept_and_changes_no_hash() -> None:
    plan = replace(PLAN, frontier=((2.0, 0.5), (4.125, 0.001)))

    assert Plan.from_json(plan.to_json()) == plan
    assert plan.plan_hash == PLAN.plan_hash
    assert '"frontier": [[2.0, 0.5], [4.125, 0.001]]' in plan.to_json()


@pytest.mark.parametrize("frontier", [3, [[1]], [[1, 2, 3]], [["2", 1]], [[2, -1]], [[True, 1]]])
def test_a_damaged_frontier_is_refused(frontier: object) -> None:
    document = json.loads(PLAN.to_json()) | {"frontier": frontier}

    with pytest.raises(PlanError, match="frontier"):
        Plan.from_json(json.dumps(document))
