"""Static formats of activations in a plan."""

import json

import pytest
from test_plan import PLAN

from afpq.errors import PlanError
from afpq.formats import AfpFormat
from afpq.plan import ActivationEntry, Plan, check_plan

STATIC = Plan(
    PLAN.entries,
    budget=5.0,
    objective="kl",
    activations=(ActivationEntry("h", AfpFormat(2, 5, signed=False), 0.0625, 0.001),),
)


def test_activations_survive_json() -> None:
    assert Plan.from_json(STATIC.to_json()) == STATIC


def test_a_plan_without_activations_has_the_json_and_hash_that_it_had() -> None:
    assert "activations" not in PLAN.to_json()
    assert Plan.from_json(PLAN.to_json()).activations is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "e2m5"}, "'h': format e2m5 has no mantissa, or integers beyond a byte"),
        ({"format": "ue3m0"}, "'h': format ue3m0 has no mantissa"),
        ({"format": "float"}, "'h': 'float' is not a format"),
        ({"scale": 0}, r"'h': scale 0\.0 is not in the range 1\.1754944e-38\.\.3\.4028235e\+38"),
        ({"scale": 1e300}, r"'h': scale 1e\+300 is not in the range"),
        ({"scale": 1e-50}, "'h': scale 1e-50 is not in the range"),
        ({"scale": 1e-40}, "'h': scale 1e-40 is not in the range"),
        ({"scale": 10**400}, "'h': scale is an integer beyond all floats"),
        ({"error": 10**400}, "'h': error is an integer beyond all floats"),
        ({"scale": "big"}, "'h': scale 'big' is not a number"),
        ({"scales": 1}, "'h': unknown field 'scales'"),
        ({"tensor": ""}, "activation 0: tensor '' is not a text"),
    ],
)
def test_a_malformed_activation_is_refused(change: dict[str, object], message: str) -> None:
    document = json.loads(STATIC.to_json())
    document["activations"][0] |= change
    with pytest.raises(PlanError, match=message):
        Plan.from_json(json.dumps(document))


def test_an_activation_that_occurs_twice_is_refused() -> None:
    document = json.loads(STATIC.to_json())
    document["activations"] *= 2
    with pytest.raises(PlanError, match="plan activation 'h' occurs twice"):
        Plan.from_json(json.dumps(document))


def test_a_scale_that_was_typed_in_is_rounded_and_loses_its_error() -> None:
    document = json.loads(STATIC.to_json())
    document["activations"][0]["scale"] = 0.1
    (entry,) = Plan.from_json(json.dumps(document)).activations or ()
    assert (entry.scale, entry.error) == (0.10009765625, None)


def test_an_activation_needs_a_scale_of_eight_bits() -> None:
    with pytest.raises(PlanError, match=r"'h': scale 0\.1 is not a bfloat16 number"):
        ActivationEntry("h", AfpFormat(0, 7), 0.1)


@pytest.mark.parametrize("scale", [0.0, -1.0, 2.0**-127, 1e300, float("nan"), float("inf")])
def test_an_activation_needs_a_scale_that_float32_holds(scale: float) -> None:
    with pytest.raises(PlanError, match=r"'h': scale .* is not in the range"):
        ActivationEntry("h", AfpFormat(0, 7), scale)


def test_an_integer_of_thousands_of_digits_is_refused() -> None:
    # Newer versions of Python do not even read it.
    text = STATIC.to_json().replace("0.0625", f"1{'0' * 5000}")
    with pytest.raises(PlanError, match=r"the plan is not JSON|beyond all floats"):
        Plan.from_json(text)


def test_check_plan_knows_the_tensors_that_layers_read() -> None:
    shapes = {"conv1": ("w1", 32, 27), "conv1b": ("w1", 32, 27), "head": ("w2", 10, 64)}
    check_plan(STATIC, shapes, ["h"])
    with pytest.raises(PlanError, match="'h': no layer reads such a tensor; nearest: g"):
        check_plan(STATIC, shapes, ["g"])
