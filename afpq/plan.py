"""The plan: which format every layer gets. JSON, readable, editable; the only artefact between search and writing.

A plan has one entry for each stored tensor (layers that share a weight share the entry). What follows from shape and
format (sizes, bits per weight) is written for the reader and computed again on reading: editing a `format` is enough.
`allocate` finds the best choice under a budget; what a choice costs in accuracy is found in `search`.
"""

import difflib
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from afpq._allocate import Option, allocate
from afpq.errors import FormatError, PlanError
from afpq.formats import AfpFormat
from afpq.packing import packed_bytes

__all__ = [
    "Option",
    "Plan",
    "PlanEntry",
    "allocate",
    "check_plan",
    "match_names",
    "parse_overrides",
    "read_format",
    "storage_bits",
]

SPEC_VERSION = 1
KINDS = ("real", "integer")
GRANULARITIES = ("per_channel", "per_tensor")
SCALE_BITS = {"real": 16, "integer": 8}
FLOAT = "float"  # the format of a layer that is not quantized


@dataclass(frozen=True)
class PlanEntry:
    """How one stored tensor [n, k] is quantized; `format` None leaves it float.

    Raises:
        PlanError: a field is out of range.
    """

    layers: tuple[str, ...]
    weight_name: str
    n: int
    k: int
    format: AfpFormat | None
    kind: str = "real"
    granularity: str = "per_channel"
    error: float | None = None  # expected squared output error, None if not known
    predicted_loss: float | None = None

    def __post_init__(self) -> None:
        where = f"plan entry {self.weight_name!r}"
        if not self.layers:
            raise PlanError(f"{where}: layers must name at least one layer")
        if self.n < 1 or self.k < 1:
            raise PlanError(f"{where}: shape [{self.n}, {self.k}] is not positive")
        if self.kind not in KINDS:
            raise PlanError(f"{where}: kind {self.kind!r} is not one of {', '.join(KINDS)}")
        if self.granularity not in GRANULARITIES:
            raise PlanError(
                f"{where}: granularity {self.granularity!r} is not one of {', '.join(GRANULARITIES)}"
            )
        if self.format is not None and not self.format.signed:
            raise PlanError(f"{where}: weights need a signed format, got {self.format}")

    @property
    def num_weights(self) -> int:
        return self.n * self.k

    @property
    def storage_bits(self) -> int:
        """Stored bits: codes, padding and scales; 32 a weight where the layer stays float."""
        if self.format is None:
            return 32 * self.num_weights
        return storage_bits(self.n, self.k, self.format, self.kind, self.granularity)

    @property
    def bits_per_weight(self) -> float:
        return self.storage_bits / self.num_weights


@dataclass(frozen=True)
class Plan:
    """Entries in the order of the model, the budget in bits per weight, and what the losses mean.

    `objective` is `kl` or `squared_error` (measured on the network's outputs), `output_error` (from calibration
    statistics alone) or `weight_error` (no data at all).
    """

    entries: tuple[PlanEntry, ...]
    budget: float | None
    objective: str
    spec_version: int = SPEC_VERSION

    @property
    def bits_per_weight(self) -> float:
        """Stored bits, side data included, over all weights that are quantized; 32 if none is."""
        quantized = [e for e in self.entries if e.format is not None]
        if not quantized:
            return 32.0
        return sum(e.storage_bits for e in quantized) / sum(e.num_weights for e in quantized)

    @property
    def predicted_loss(self) -> float | None:
        """Sum over the entries; None when one is not known."""
        # Of what is written: a plan that was read has the same sum, and so the same hash.
        losses = [_rounded(e.predicted_loss) for e in self.entries if e.format is not None]
        known = [x for x in losses if x is not None]
        return sum(known) if len(known) == len(losses) else None

    @property
    def plan_hash(self) -> str:
        """sha256 of the canonical JSON, hexadecimal."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """Canonical JSON: the same plan gives the same bytes, on every machine."""
        head = {
            "spec_version": self.spec_version,
            "objective": self.objective,
            "budget": _rounded(self.budget),
            "bits_per_weight": _rounded(self.bits_per_weight),
            "predicted_loss": _rounded(self.predicted_loss),
        }
        lines = [f"  {json.dumps(key)}: {json.dumps(value)},\n" for key, value in head.items()]
        entries = ",\n".join(f"    {json.dumps(_entry_fields(e))}" for e in self.entries)
        body = f"[\n{entries}\n  ]" if self.entries else "[]"
        return "{\n" + "".join(lines) + f'  "entries": {body}\n' + "}\n"

    @staticmethod
    def from_json(text: str) -> "Plan":
        """Reads a plan; an entry whose size does not follow from its format was edited and loses its predictions.

        Raises:
            PlanError: the text is not JSON, or a field is missing, unknown or out of range; names the entry.
        """
        try:
            document = json.loads(text)
        except json.JSONDecodeError as error:
            raise PlanError(f"the plan is not JSON: {error}") from error
        if not isinstance(document, dict):
            raise PlanError("the plan is not a JSON object")
        fields = _Fields("plan", document)
        fields.only(
            "spec_version", "objective", "budget", "bits_per_weight", "predicted_loss", "entries"
        )
        version = fields.integer("spec_version")
        if version != SPEC_VERSION:
            raise PlanError(f"plan: spec_version {version}, this afpq reads {SPEC_VERSION}")
        fields.number("bits_per_weight", optional=True)
        fields.number("predicted_loss", optional=True)
        items = fields.get("entries")
        if not isinstance(items, list):
            raise PlanError("plan: entries is not a list")
        entries = tuple(_read_entry(i, item) for i, item in enumerate(items))
        _check_unique(entries)
        budget = fields.number("budget", optional=True)
        return Plan(entries, budget, fields.text("objective"), version)


def storage_bits(n: int, k: int, fmt: AfpFormat, kind: str, granularity: str) -> int:
    """Stored bits of a weight [n, k]: packed codes with their padding, and scales."""
    scales = n if granularity == "per_channel" else 1
    return 8 * packed_bytes(n, k, fmt.bits) + scales * SCALE_BITS[kind]


def match_names(patterns: Iterable[str], names: Sequence[str], what: str) -> dict[str, list[str]]:
    """The names that each pattern (a name, or a glob with * ? [..]) matches; `what` is the option it came from.

    Raises:
        PlanError: a pattern matches nothing; the nearest names are listed.
    """
    result: dict[str, list[str]] = {}
    for pattern in patterns:
        exact = [name for name in names if name == pattern]
        result[pattern] = exact or [name for name in names if fnmatchcase(name, pattern)]
        if not result[pattern]:
            raise PlanError(f"{what} {pattern!r} matches no layer{_nearest(pattern, names)}")
    return result


def parse_overrides(texts: Iterable[str]) -> dict[str, str]:
    """Reads `GLOB=e2m3` options (or `GLOB=float`) in order.

    Raises:
        PlanError: an option has no `=`, or its format does not exist.
    """
    result: dict[str, str] = {}
    for text in texts:
        pattern, separator, fmt = text.rpartition("=")
        if not separator or not pattern:
            raise PlanError(f"--layer {text!r} is not GLOB=FORMAT, such as 'conv*=e2m3'")
        read_format(fmt, f"--layer {text!r}")
        result.pop(pattern, None)
        result[pattern] = fmt
    return result


def read_format(text: str, where: str) -> AfpFormat | None:
    """A signed format, or None for `float`.

    Raises:
        PlanError: it is neither.
    """
    if text == FLOAT:
        return None
    try:
        fmt = AfpFormat.parse(text)
    except FormatError as error:
        raise PlanError(f"{where}: {error}") from error
    if not fmt.signed:
        raise PlanError(f"{where}: weights need a signed format, got {fmt}")
    return fmt


def check_plan(plan: Plan, shapes: Mapping[str, tuple[str, int, int]]) -> None:
    """Checks a plan against a model's layers: name -> (weight_name, n, k).

    Layers that the plan does not mention stay float.

    Raises:
        PlanError: the plan names a layer that the model does not have, or one of another shape or weight.
    """
    for entry in plan.entries:
        for name in entry.layers:
            if name not in shapes:
                raise PlanError(
                    f"plan entry {entry.weight_name!r}: the model has no layer {name!r}"
                    f"{_nearest(name, list(shapes))}"
                )
            weight_name, n, k = shapes[name]
            if weight_name != entry.weight_name:
                raise PlanError(
                    f"plan entry {entry.weight_name!r}: layer {name!r} has the weight {weight_name!r}"
                )
            if (n, k) != (entry.n, entry.k):
                raise PlanError(
                    f"plan entry {entry.weight_name!r}: layer {name!r} is [{n}, {k}], "
                    f"the plan says [{entry.n}, {entry.k}]"
                )


class _Fields:
    """Typed access to a JSON object, with errors that say where."""

    def __init__(self, where: str, values: Mapping[str, Any]) -> None:
        self.where, self._values = where, values

    def only(self, *names: str) -> None:
        unknown = sorted(set(self._values) - set(names))
        if unknown:
            raise PlanError(
                f"{self.where}: unknown field {unknown[0]!r}{_nearest(unknown[0], names)}"
            )

    def get(self, name: str) -> Any:
        if name not in self._values:
            raise PlanError(f"{self.where}: field {name!r} is missing")
        return self._values[name]

    def text(self, name: str) -> str:
        value = self.get(name)
        if not isinstance(value, str) or not value:
            raise PlanError(f"{self.where}: {name} {value!r} is not a text")
        return value

    def integer(self, name: str) -> int:
        value = self.get(name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise PlanError(f"{self.where}: {name} {value!r} is not an integer")
        return value

    def number(self, name: str, *, optional: bool) -> float | None:
        value = self._values.get(name) if optional else self.get(name)
        if value is None and optional:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise PlanError(f"{self.where}: {name} {value!r} is not a number")
        if not (math.isfinite(value) and value >= 0):
            raise PlanError(f"{self.where}: {name} {value!r} is not a finite number of at least 0")
        return float(value)


def _read_entry(index: int, item: object) -> PlanEntry:
    if not isinstance(item, dict):
        raise PlanError(f"plan entry {index} is not a JSON object")
    fields = _Fields(f"plan entry {index}", item)
    weight_name = fields.text("weight_name")
    fields.where = f"plan entry {weight_name!r}"
    fields.only(*_entry_fields(PlanEntry(("",), "", 1, 1, None)))
    layers = fields.get("layers")
    if not isinstance(layers, list) or not all(isinstance(name, str) for name in layers):
        raise PlanError(f"{fields.where}: layers is not a list of names")
    shape = fields.get("shape")
    if not isinstance(shape, list) or [type(x) for x in shape] != [int, int]:
        raise PlanError(f"{fields.where}: shape {shape!r} is not [n, k]")
    entry = PlanEntry(
        layers=tuple(layers),
        weight_name=weight_name,
        n=shape[0],
        k=shape[1],
        format=read_format(fields.text("format"), fields.where),
        kind=fields.text("kind"),
        granularity=fields.text("granularity"),
    )
    fields.number("bits_per_weight", optional=True)
    if fields.number("storage_bits", optional=True) != entry.storage_bits:
        return entry
    error = fields.number("error", optional=True)
    loss = fields.number("predicted_loss", optional=True)
    return PlanEntry(**{**vars(entry), "error": error, "predicted_loss": loss})


def _entry_fields(entry: PlanEntry) -> dict[str, Any]:
    return {
        "layers": list(entry.layers),
        "weight_name": entry.weight_name,
        "shape": [entry.n, entry.k],
        "format": FLOAT if entry.format is None else str(entry.format),
        "kind": entry.kind,
        "granularity": entry.granularity,
        "storage_bits": entry.storage_bits,
        "bits_per_weight": _rounded(entry.bits_per_weight),
        "error": _rounded(entry.error),
        "predicted_loss": _rounded(entry.predicted_loss),
    }


def _check_unique(entries: Iterable[PlanEntry]) -> None:
    weights: set[str] = set()
    layers: set[str] = set()
    for entry in entries:
        if entry.weight_name in weights:
            raise PlanError(f"plan entry {entry.weight_name!r} occurs twice")
        weights.add(entry.weight_name)
        for name in entry.layers:
            if name in layers:
                raise PlanError(
                    f"plan entry {entry.weight_name!r}: layer {name!r} is in another entry too"
                )
            layers.add(name)


def _rounded(value: float | None) -> float | None:
    # Nine digits: more than any loss means, and short enough to be the same after every round trip.
    return None if value is None else float(f"{value:.9g}")


def _nearest(name: str, names: Iterable[str]) -> str:
    choices = list(dict.fromkeys(names))
    near = difflib.get_close_matches(name.strip("*?"), choices, 3, 0.5)
    if not near:
        near = choices[:3] + (["..."] if len(choices) > 3 else [])
    return f"; nearest: {', '.join(near)}" if near else ""
