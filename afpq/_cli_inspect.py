"""The command `inspect`: layers of a model, float or packed, with a histogram of each layer's weights."""

import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from afpq._cli_output import format_bytes, json_option, print_json, print_line, print_table
from afpq._tree import tree_lines

__all__ = ["inspect"]

_BINS = 12
_BARS = " ▁▂▃▄▅▆▇█"


@click.command(short_help="Layers, names for globs, sizes, formats.")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--tree", "as_tree", is_flag=True, help="Layers by the parts of their names, with sums."
)
@json_option
def inspect(model: Path, *, as_tree: bool, as_json: bool) -> None:
    """Layers of a model, float or packed: names to use in globs, sizes, formats.

    \b
    Examples:
      afpq inspect model.onnx
      afpq inspect packed.onnx --tree
      afpq inspect packed.onnx --json | jq '.layers[].format'
    """
    from afpq.packed import is_packed, read_ir

    result = _inspect_packed(model) if is_packed(read_ir(model)) else _inspect_float(model)
    if as_json:
        print_json(result)
    elif as_tree:
        _print_tree(result)
    elif result["packed"]:
        _print_packed(result)
    else:
        _print_float(result)


def _inspect_float(path: Path) -> dict[str, Any]:
    from afpq.graph import load_model
    from afpq.packed import file_bytes

    model = load_model(path)
    owners = {name: layer.name for name, layer in model.tensors().items()}
    return {
        "packed": False,
        "path": str(path),
        "file_bytes": file_bytes(path),
        "num_weights": model.num_weights,
        "float_weight_bytes": model.float_weight_bytes,
        "inputs": [_signature(i) for i in model.inputs],
        "outputs": [_signature(o) for o in model.outputs],
        "layers": [
            {
                "name": layer.name,
                "op": layer.op_type,
                "kind": layer.kind,
                "n": layer.n,
                "k": layer.k,
                "groups": layer.groups,
                "num_weights": layer.num_weights,
                "dtype": layer.dtype,
                "shared_with": None
                if owners[layer.weight_name] == layer.name
                else owners[layer.weight_name],
                "note": layer.note,
                "histogram": _histogram(layer.weight),
            }
            for layer in model.layers
        ],
        "left_float": [asdict(s) for s in model.skipped],
    }


def _print_float(result: dict[str, Any]) -> None:
    rows = [
        (
            e["name"],
            e["op"] + (f" /{e['groups']}" if e["groups"] > 1 else ""),
            f"{e['n']} x {e['k']}",
            _bars(e["histogram"]),
            f"{e['histogram']['limit']:.3g}",
            "shared" if e["shared_with"] else f"{e['num_weights']:,}",
        )
        for e in result["layers"]
    ]
    print_table(("layer", "op", "n x k", "histogram", "+-", "weights"), rows, left=2)
    for entry in result["layers"]:
        if entry["note"]:
            print_line(f"note: {entry['name']}: {entry['note']}")
    _print_signatures(result)
    if result["left_float"]:
        print_line()
        print_line("left float:")
        for entry in result["left_float"]:
            print_line(f"  {entry['name']} ({entry['op_type']}): {entry['reason']}")
    print_line()
    count, weights = len(result["layers"]), result["num_weights"]
    print_line(f"{count} layers, {weights:,} weights, {result['float_weight_bytes']:,} bytes")
    print_line(f"{result['path']}: {format_bytes(result['file_bytes'])}")


def _inspect_packed(path: Path) -> dict[str, Any]:
    from afpq.packed import read_packed, weight_values
    from afpq.report import build_report

    model = read_packed(path)
    report = build_report(model)
    histograms = {layer.name: _histogram(weight_values(layer)) for layer in model.layers}
    graph = model.graph.graph
    return {
        "packed": True,
        "path": str(path),
        "file_bytes": model.file_bytes,
        "bits_per_weight": report["size"]["bits_per_weight"],
        "packed_bytes": report["size"]["packed_weights_bytes"],
        "plan_hash": model.metadata.get("afpq.plan_hash"),
        "written_by": model.metadata.get("afpq.version"),
        "inputs": [_value(v) for v in graph.inputs],
        "outputs": [_value(v) for v in graph.outputs],
        "layers": [e | {"histogram": histograms[e["name"]]} for e in report["layers"]],
        "float_tensors": report["float_tensors"],
    }


def _print_packed(result: dict[str, Any]) -> None:
    rows = [
        (
            e["name"],
            e["op"],
            e["format"],
            e["kernel"],
            e["input_format"],
            _bars(e["histogram"]),
            f"{e['histogram']['limit']:.3g}",
            f"{e['bits_per_weight']:.2f}",
            "shared" if e["shared_with"] else f"{e['bytes']:,}",
        )
        for e in result["layers"]
    ]
    columns = ("layer", "op", "format", "kernel", "input", "histogram", "+-", "bits/w", "bytes")
    print_table(columns, rows, left=5)
    for remark in dict.fromkeys(e["remark"] for e in result["layers"] if e["remark"]):
        names = [e["name"] for e in result["layers"] if e["remark"] == remark]
        print_line(f"{len(names)} layers: {remark}")
    _print_signatures(result)
    print_line()
    if result["bits_per_weight"] is not None:
        print_line(
            f"{result['bits_per_weight']:.3f} bits per weight, {result['packed_bytes']:,} bytes packed"
        )
    rest = sum(t["nbytes"] for t in result["float_tensors"])
    if rest:
        print_line(f"{len(result['float_tensors'])} float constants stay: {rest:,} bytes")
    print_line(f"{result['path']}: {format_bytes(result['file_bytes'])}")


def _print_tree(result: dict[str, Any]) -> None:
    def describe(entry: Mapping[str, Any]) -> str:
        if result["packed"]:
            bits = f"{entry['bits_per_weight']:.2f} bits"
            return f"{entry['op']}, {entry['num_weights']:,} weights, {bits}: {entry['format']}"
        return f"{entry['op']} {entry['n']} x {entry['k']}"

    def total(entries: list[Mapping[str, Any]]) -> str:
        own = [e for e in entries if not e["shared_with"]]
        weights = sum(e["num_weights"] for e in own)
        if not result["packed"] or not weights:
            return f"{len(entries)} layers, {weights:,} weights"
        bits = 8 * sum(e["bytes"] for e in own) / weights
        return f"{len(entries)} layers, {weights:,} weights, {bits:.2f} bits"

    lines = list(tree_lines(result["layers"], describe, total))
    width = max((len(name) for name, _ in lines), default=0)
    for name, text in lines:
        print_line(f"{name:{width}}  {text}")
    print_line(f"{'':{width}}  {total(result['layers'])}")


def _signature(info: Any) -> dict[str, Any]:
    return {"name": info.name, "dtype": info.dtype, "shape": info.shape}


def _value(value: Any) -> dict[str, Any]:
    shape = None
    if value.shape is not None:
        shape = [d if isinstance(d, int) else d.value for d in value.shape]
    dtype = str(value.dtype.numpy()) if value.dtype is not None else "unknown"
    return {"name": value.name, "dtype": dtype, "shape": shape}


def _print_signatures(result: dict[str, Any]) -> None:
    print_line()
    for side in ("inputs", "outputs"):
        for entry in result[side]:
            shape = (
                "?" if entry["shape"] is None else ", ".join(str(d or "?") for d in entry["shape"])
            )
            print_line(f"{side[:-1]} {entry['name']}: {entry['dtype']} [{shape}]")


def _histogram(weight: npt.NDArray[np.float32]) -> dict[str, Any]:
    """How many weights lie in each of twelve equal parts of -limit..limit, the limit being the largest magnitude."""
    limit = float(np.abs(weight).max(initial=0.0))
    counts, _ = np.histogram(weight, _BINS, (-limit or -1.0, limit or 1.0))
    return {"limit": limit, "counts": counts.tolist()}


def _bars(histogram: dict[str, Any]) -> str:
    """The counts as blocks of eight heights; nothing where the output cannot show them."""
    counts = histogram["counts"]
    top = max(counts)
    # The lowest block is for any count at all: what is empty looks empty.
    bars = "".join(_BARS[-(-8 * count // top) if top else 0] for count in counts)
    try:
        bars.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return ""
    return bars
