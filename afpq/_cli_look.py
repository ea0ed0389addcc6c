"""The commands that look at a file or at this machine: inspect, formats, verify, doctor."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from afpq._cli_output import (
    StageProgress,
    format_bytes,
    json_option,
    print_json,
    print_line,
    print_table,
    threads_option,
)

__all__ = ["doctor", "formats", "inspect", "verify"]

_FIT = {
    "byte": "signed bytes, integer dot products",
    "pair": "two byte planes, integer dot products",
    "wide": "float32 lanes",
}


@click.command(short_help="Layers, names for globs, sizes, formats.")
@click.argument("model", type=click.Path(path_type=Path))
@json_option
def inspect(model: Path, *, as_json: bool) -> None:
    """Layers of a model, float or packed: names to use in globs, sizes, formats."""
    from afpq.packed import is_packed, read_ir

    result = _inspect_packed(model) if is_packed(read_ir(model)) else _inspect_float(model)
    if as_json:
        print_json(result)
    elif result["packed"]:
        _print_packed(result)
    else:
        _print_float(result)


@click.command(short_help="The number formats and how each is executed.")
@json_option
def formats(*, as_json: bool) -> None:
    """Every number format: its values and how it is executed."""
    from afpq.formats import all_formats, codebook

    rows: list[dict[str, Any]] = [
        {
            "format": str(fmt),
            "bits": fmt.bits,
            "values": len(set(codebook(fmt).tolist())),
            "max_integer": fmt.max_integer,
            "smallest": 2.0 ** (1 - fmt.mantissa_bits),
            "largest": fmt.max_integer * 2.0 ** (1 - fmt.mantissa_bits),
            "kernel": fmt.kernel_class,
        }
        for fmt in sorted(all_formats(), key=lambda f: (f.bits, f))
    ]
    if as_json:
        print_json(rows)
        return
    columns = ("format", "kernel", "bits", "values", "smallest", "largest", "max/min")
    print_table(
        columns,
        [
            (
                r["format"],
                r["kernel"],
                f"{r['bits']}",
                f"{r['values']}",
                f"{r['smallest']:g}",
                f"{r['largest']:g}",
                f"{r['max_integer']}",
            )
            for r in rows
        ],
        left=2,
    )
    print_line()
    print_line("smallest and largest magnitude for exponent_bias 0; each bias step halves them")
    for name, text in _FIT.items():
        print_line(f"{name}: {text}")


@click.command(short_help="Check a packed model and how it is executed.")
@click.argument("model", type=click.Path(path_type=Path))
@threads_option
@json_option
def verify(model: Path, *, threads: int, as_json: bool) -> int:
    """Check a packed model: checksums, codes, and that the runtime computes what the format says."""
    from afpq.verify import verify as run

    with StageProgress() as progress:
        findings = run(model, threads=threads, progress=progress)
    failed = [f for f in findings if not f.passed]
    if as_json:
        print_json({"passed": not failed, "findings": [asdict(f) for f in findings]})
        return 1 if failed else 0
    for finding in failed:
        print_line(f"FAILED  {finding.check:9} {finding.layer or model}: {finding.detail}")
    for check in dict.fromkeys(f.check for f in findings):
        total = [f for f in findings if f.check == check]
        print_line(f"{check:9} {sum(f.passed for f in total)} of {len(total)} passed")
    print_line(f"{model}: {'DAMAGED or not executed as defined' if failed else 'sound'}")
    return 1 if failed else 0


@click.command(short_help="What works on this machine.")
@json_option
def doctor(*, as_json: bool) -> int:
    """What of afpq works on this machine: versions, instruction sets, the custom-op library."""
    from afpq.doctor import doctor as run

    checks = run()
    failed = any(not check.passed for check in checks)
    if as_json:
        print_json({"passed": not failed, "checks": [asdict(check) for check in checks]})
    else:
        for check in checks:
            print_line(f"{'ok  ' if check.passed else 'FAIL'}  {check.name:18} {check.detail}")
    return 1 if failed else 0


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
            "shared" if e["shared_with"] else f"{e['num_weights']:,}",
        )
        for e in result["layers"]
    ]
    print_table(("layer", "op", "n x k", "weights"), rows, left=2)
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
    from afpq.packed import read_packed
    from afpq.report import build_report

    model = read_packed(path)
    report = build_report(model)
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
        "layers": report["layers"],
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
            f"{e['bits_per_weight']:.2f}",
            "shared" if e["shared_with"] else f"{e['bytes']:,}",
        )
        for e in result["layers"]
    ]
    print_table(("layer", "op", "format", "kernel", "input", "bits/w", "bytes"), rows, left=5)
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
