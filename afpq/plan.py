"""The plan: which format every layer gets. JSON, readable, editable; the only artefact between search and writing.

A plan has one entry for each stored tensor (layers that share a weight share the entry). What follows from shape and
format (sizes, bits per weight) is written for the reader and computed again on reading: editing a `format` is enough.
`allocate` finds the best choice under a budget; what a choice costs in accuracy is found in `search`.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from afpq._activation_entry import ActivationEntry, read_activation
from afpq._allocate import Option, allocate, fastest
from afpq._fields import Fields, nearest, rounded
from afpq.errors import FormatError, PlanError
from afpq.formats import AfpFormat
from afpq.packing import packed_bytes

__all__ = [
    "ActivationEntry",
    "Option",
    "Plan",
    "PlanEntry",
    "allocate",
    "check_plan",
    "fastest",
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
    statistics alone) or `weight_error` (no data at all). `activations` holds the static formats of tensors that layers
    read, None before they were chosen; a tensor without an entry is rounded by the range of each row. `frontier` tells
    what other budgets would have given, as pairs of bits per weight and predicted loss; it decides nothing.

    Example:
        >>> plan = afpq.search("models/lenet5_digits.onnx", bits=5)
        >>> [str(entry.format) for entry in plan.entries if "Conv" in entry.layers[0]]  # doctest: +ELLIPSIS
        [...]
        >>> afpq.Plan.from_json(plan.to_json()).plan_hash == plan.plan_hash
        True
    """

    entries: tuple[PlanEntry, ...]
    budget: float | None
    objective: str
    spec_version: int = SPEC_VERSION
    activations: tuple[ActivationEntry, ...] | None = None
    frontier: tuple[tuple[float, float], ...] = ()

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
        losses = [rounded(e.predicted_loss) for e in self.entries if e.format is not None]
        known = [x for x in losses if x is not None]
        return sum(known) if len(known) == len(losses) else None

    @property
    def plan_hash(self) -> str:
        """sha256 of the canonical JSON without the frontier, hexadecimal: of what decides about the file."""
        return hashlib.sha256(replace(self, frontier=()).to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """Canonical JSON: the same plan gives the same bytes, on every machine."""
        head = {
            "spec_version": self.spec_version,
            "objective": self.objective,
            "budget": rounded(self.budget),
            "bits_per_weight": rounded(self.bits_per_weight),
            "predicted_loss": rounded(self.predicted_loss),
        }
        if self.frontier:
            head["frontier"] = [[rounded(bits), rounded(loss)] for bits, loss in self.frontier]
        lines = [f"  {json.dumps(key)}: {json.dumps(value)},\n" for key, value in head.items()]
        sections = {"entries": [_entry_fields(e) for e in self.entries]}
        if self.activations is not None:
            sections["activations"] = [entry.fields() for entry in self.activations]
        body = ",\n".join(f'  "{name}": {_list(items)}' for name, items in sections.items())
        return "{\n" + "".join(lines) + body + "\n}\n"

    @staticmethod
    def from_json(text: str) -> "Plan":
        """Reads a plan; an entry whose size does not follow from its format was edited and loses its predictions.

        Raises:
            PlanError: the text is not JSON, or a field is missing, unknown or out of range; names the entry.
        """
        try:
            document = json.loads(text)
        except ValueError as error:  # also of integers with more digits than Python reads
            raise PlanError(f"the plan is not JSON: {error}") from error
        if not isinstance(document, dict):
            raise PlanError("the plan is not a JSON object")
        fields = Fields("plan", document)
        fields.only(
            "spec_version",
            "objective",
            "budget",
            "bits_per_weight",
            "predicted_loss",
            "frontier",
            "entries",
            "activations",
        )
        version = fields.integer("spec_version")
        if version != SPEC_VERSION:
            raise PlanError(f"plan: spec_version {version}, this afpq reads {SPEC_VERSION}")
        fields.number("bits_per_weight", optional=True)
        fields.number("predicted_loss", optional=True)
        entries = tuple(_read_entry(i, item) for i, item in enumerate(fields.items("entries")))
        _check_unique(entries)
        activations = None
        if "activations" in document:
            items = fields.items("activations")
            activations = tuple(read_activation(i, item) for i, item in enumerate(items))
            _check_tensors(activations)
        budget = fields.number("budget", optional=True)
        frontier = _read_frontier(document.get("frontier", []))
        return Plan(entries, budget, fields.text("objective"), version, activations, frontier)


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
            raise PlanError(f"{what} {pattern!r} matches no layer{nearest(pattern, names)}")
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


def check_plan(
    plan: Plan, shapes: Mapping[str, tuple[str, int, int]], tensors: Iterable[str] = ()
) -> None:
    """Checks a plan against a model's layers: name -> (weight_name, n, k), and the tensors that these read.

    Layers that the plan does not mention stay float.

    Raises:
        PlanError: the plan names a layer that the model does not have, or one of another shape or weight; or a
            tensor that no layer reads.
    """
    known = set(tensors)
    for activation in plan.activations or ():
        if activation.tensor not in known:
            raise PlanError(
                f"plan activation {activation.tensor!r}: no layer reads such a tensor"
                f"{nearest(activation.tensor, sorted(known))}"
            )
    for entry in plan.entries:
        for name in entry.layers:
            if name not in shapes:
                raise PlanError(
                    f"plan entry {entry.weight_name!r}: the model has no layer {name!r}"
                    f"{nearest(name, list(shapes))}"
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


def _read_entry(index: int, item: object) -> PlanEntry:
    if not isinstance(item, dict):
        raise PlanError(f"plan entry {index} is not a JSON object")
    fields = Fields(f"plan entry {index}", item)
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


def _read_frontier(items: object) -> tuple[tuple[float, float], ...]:
    if not isinstance(items, list) or not all(isinstance(i, list) and len(i) == 2 for i in items):
        raise PlanError("plan: frontier is not a list of [bits per weight, loss]")
    points = []
    for bits, loss in items:
        fields = Fields("plan frontier", {"bits per weight": bits, "loss": loss})
        found = [fields.number(name, optional=False) for name in ("bits per weight", "loss")]
        points.append((found[0] or 0.0, found[1] or 0.0))
    return tuple(points)


def _entry_fields(entry: PlanEntry) -> dict[str, Any]:
    return {
        "layers": list(entry.layers),
        "weight_name": entry.weight_name,
        "shape": [entry.n, entry.k],
        "format": FLOAT if entry.format is None else str(entry.format),
        "kind": entry.kind,
        "granularity": entry.granularity,
        "storage_bits": entry.storage_bits,
        "bits_per_weight": rounded(entry.bits_per_weight),
        "error": rounded(entry.error),
        "predicted_loss": rounded(entry.predicted_loss),
    }


def _list(items: list[dict[str, Any]]) -> str:
    lines = ",\n".join(f"    {json.dumps(item)}" for item in items)
    return f"[\n{lines}\n  ]" if items else "[]"


def _check_tensors(activations: Iterable[ActivationEntry]) -> None:
    seen: set[str] = set()
    for entry in activations:
        if entry.tensor in seen:
            raise PlanError(f"plan activation {entry.tensor!r} occurs twice")
        seen.add(entry.tensor)


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
