"""The command `diff`: two packed models side by side, layer by layer."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from afpq._cli_output import format_change, json_option, print_json, print_line, print_table

if TYPE_CHECKING:
    from afpq.packed import PackedLayer, PackedModel

__all__ = ["diff"]


@click.command(short_help="Two packed models side by side.")
@click.argument("first", type=click.Path(path_type=Path), metavar="A.onnx")
@click.argument("second", type=click.Path(path_type=Path), metavar="B.onnx")
@json_option
def diff(first: Path, second: Path, *, as_json: bool) -> None:
    """Formats and sizes of two packed models, layer by layer, and how far apart their weights are.

    The last column is the energy of A's weights over that of the difference, in dB.

    \b
    Examples:
      afpq diff a.onnx b.onnx
    """
    from afpq.packed import read_packed

    a, b = read_packed(first), read_packed(second)
    layers = _layers(a, b)
    sides = _facts(a), _facts(b)
    result = {
        "first": sides[0],
        "second": sides[1],
        "layers": layers,
        "num_different": sum(not e["same"] for e in layers),
    }
    if as_json:
        print_json(result)
        return
    columns = ("layer", "A", "B", "bits/w A", "B", "bytes A", "B", "A / (A - B) dB")
    print_table(columns, [_row(e) for e in layers], left=3)
    print_line()
    if not result["num_different"]:
        print_line(f"all {len(layers)} layers are stored alike")
    else:
        print_line(f"{result['num_different']} of {len(layers)} layers differ")
    bits = [side["bits_per_weight"] for side in sides]
    print_line(" -> ".join("none" if x is None else f"{x:.3f}" for x in bits) + " bits per weight")
    print_line(f"{first} -> {second}: {format_change(a.file_bytes, b.file_bytes)}")


def _facts(model: "PackedModel") -> dict[str, Any]:
    tensors = model.tensors().values()
    weights = sum(t.num_weights for t in tensors)
    stored = 8 * sum(t.storage_bytes for t in tensors)
    return {
        "path": str(model.path),
        "file_bytes": model.file_bytes,
        "bits_per_weight": stored / weights if weights else None,
        "plan_hash": model.metadata.get("afpq.plan_hash"),
    }


def _layers(a: "PackedModel", b: "PackedModel") -> list[dict[str, Any]]:
    firsts, seconds = ({layer.name: layer for layer in model.layers} for model in (a, b))
    return [_layer(name, firsts, seconds) for name in dict.fromkeys([*firsts, *seconds])]


def _layer(
    name: str, firsts: Mapping[str, "PackedLayer"], seconds: Mapping[str, "PackedLayer"]
) -> dict[str, Any]:
    a, b = firsts.get(name), seconds.get(name)
    same, sqnr = False, None
    if a is not None and b is not None:
        same, sqnr = _distance(a, b)
    return {"name": name, "first": _side(a), "second": _side(b), "same": same, "sqnr_db": sqnr}


def _side(layer: "PackedLayer | None") -> dict[str, Any] | None:
    if layer is None:
        return None
    return {
        "format": str(layer.format),
        "kind": layer.kind,
        "granularity": layer.granularity,
        "input_format": layer.input_format,
        "bits_per_weight": layer.bits_per_weight,
        "bytes": layer.storage_bytes,
    }


def _distance(a: "PackedLayer", b: "PackedLayer") -> tuple[bool, float | None]:
    """Whether two layers are stored alike, and the SQNR of one against the other; None where it is infinite."""
    from afpq.packed import weight_values

    stored = (a.format, a.group_size, a.activations, a.activation_format, a.activation_scale)
    other = (b.format, b.group_size, b.activations, b.activation_format, b.activation_scale)
    same = (
        stored == other
        and np.array_equal(a.packed, b.packed)
        and a.stored_scale.dtype == b.stored_scale.dtype
        and np.array_equal(a.stored_scale, b.stored_scale)
    )
    x, y = (weight_values(layer).astype(np.float64) for layer in (a, b))
    if x.shape != y.shape:
        return False, None
    signal, noise = float(np.square(x).sum()), float(np.square(x - y).sum())
    return same, 10 * np.log10(signal / noise) if signal > 0 and noise > 0 else None


def _row(entry: dict[str, Any]) -> tuple[str, ...]:
    sides = (entry["first"], entry["second"])
    change = "same" if entry["same"] else "-"
    if entry["sqnr_db"] is not None:
        change = f"{entry['sqnr_db']:.1f}"
    return (
        entry["name"],
        *("float" if s is None else s["format"] for s in sides),
        *("" if s is None else f"{s['bits_per_weight']:.2f}" for s in sides),
        *("" if s is None else f"{s['bytes']:,}" for s in sides),
        change,
    )
