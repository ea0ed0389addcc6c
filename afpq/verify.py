"""Checks a packed model against its own checksums, and the runtime against the definition of the format.

For every stored tensor: the checksum in the metadata, and codes that are complete and canonical. For every layer, by
onnxruntime: `Unpack` of its bytes must equal the NumPy decoder bit for bit, and the layer, run alone on a random input,
must agree with a float64 product of the decoded weights within a derived bound.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from afpq.errors import AfpqError
from afpq.formats import fake_quantize
from afpq.packed import PackedLayer, PackedModel, checksum, read_packed, weight_values
from afpq.packing import unpack
from afpq.runtime import session

__all__ = ["Finding", "check_decode", "check_run", "verify"]

Floats = npt.NDArray[np.float32]
Progress = Callable[[str, int, int], None]

_ROWS = 3
_HALF_ULP = 2.0**-24  # relative rounding error of one float32 operation
_LEVELS = {"a16": 65535, "a8": 255}  # steps in an activation's range


@dataclass(frozen=True)
class Finding:
    """One check; `detail` says what holds, or what is wrong. `layer` is empty for the file as a whole."""

    layer: str
    check: str  # "load", "checksum", "codes", "decode", "run"
    passed: bool
    detail: str


def verify(
    path: str | Path, *, threads: int = 0, progress: Progress | None = None
) -> list[Finding]:
    """Runs every check on a packed file; the findings are in the order of the layers.

    Raises:
        ModelError: the file cannot be read, or is not a packed model.
        RuntimeUnavailableError: the custom-op library is missing or does not load.
    """
    model = read_packed(path)
    findings = [_attempt("", "load", lambda: _check_load(model, threads))]
    seen: set[str] = set()
    for number, layer in enumerate(model.layers, 1):
        if layer.weight_name not in seen:
            seen.add(layer.weight_name)
            findings += _check_tensor(layer, model.checksums, threads)
        if layer.op != "Unpack":
            findings.append(_attempt(layer.name, "run", partial(check_run, layer, threads)))
        if progress is not None:
            progress("verify", number, len(model.layers))
    return findings


def check_decode(layer: PackedLayer, threads: int = 0) -> str:
    """Compares the runtime's decoder with NumPy's on every weight of a layer.

    Raises:
        AfpqError: they differ.
    """
    fields = {"format": str(layer.format), "n": layer.n, "k": layer.k, "shape": [layer.n, layer.k]}
    if layer.group_size:
        fields["group_size"] = layer.group_size
    decoded = _run_alone(layer, "Unpack", fields, [], None, threads)
    expected = weight_values(layer)
    wrong = np.flatnonzero(decoded.view(np.uint32) != expected.view(np.uint32))
    if wrong.size:
        row, column = divmod(int(wrong[0]), layer.k)
        raise AfpqError(
            f"{wrong.size} of {expected.size} weights differ, first [{row}, {column}]: "
            f"{decoded[row, column]!r} instead of {expected[row, column]!r}"
        )
    return f"{expected.size} weights equal to the last bit"


def check_run(layer: PackedLayer, threads: int = 0) -> str:
    """Runs a layer alone: table rows must be exact, products of a seeded random input are compared with float64.

    The bound of an output is half an activation step times the sum of |weights|, plus float32 rounding. An input with
    a static format is rounded by the definition first, so that only float32 rounding is left.

    Raises:
        AfpqError: an output is outside its bound.
    """
    if layer.op == "Gather":
        return _check_rows(layer, threads)
    weight = weight_values(layer).astype(np.float64)
    x = _input(layer)
    fields = _fields(layer)
    bias = layer.node.inputs[3] if len(layer.node.inputs) > 3 else None
    y = _run_alone(layer, layer.op, fields, [bias] if bias is not None else [], x, threads)
    expected = _product(layer, _as_read(layer, x), weight)
    if bias is not None and bias.const_value is not None:
        offset = bias.const_value.numpy().astype(np.float64)
        expected = expected + _along_channels(layer, offset, expected.ndim)
    low, high = fields.get("clip_min", -np.inf), fields.get("clip_max", np.inf)
    expected = np.clip(expected, low, high)
    bound = _along_channels(layer, _bound(layer, x, weight, np.abs(expected).max()), y.ndim)
    share = float((np.abs(y - expected) / bound).max()) if np.isfinite(y).all() else np.inf
    if share > 1:
        raise AfpqError(f"an output is {share:.3g} times further from float64 than the bound")
    _check_bytes(layer, fields, [] if bias is None else [bias], x, y, threads)
    return f"within {share:.0%} of the bound on {y.size} outputs"


def _check_bytes(
    layer: PackedLayer,
    fields: dict[str, Any],
    more: list[ir.Value],
    x: Floats,
    y: Floats,
    threads: int,
) -> None:
    """Where a layer writes bytes, they must be its outputs `y` as the definition rounds them."""
    fmt, scale = layer.output_format, layer.output_scale
    if fmt is None or scale is None:
        return
    fields = fields | {"output_format": str(fmt), "output_scale": scale}
    stored = _run_alone(layer, "ConvU8", fields, more, x, threads)
    found = (np.moveaxis(stored, -1, 1) - fmt.zero_byte) * np.float32(scale)
    wrong = found != fake_quantize(y, fmt, scale)
    if wrong.any():
        raise AfpqError(f"{np.count_nonzero(wrong)} of {y.size} bytes are not the rounded outputs")


def _fields(layer: PackedLayer) -> dict[str, Any]:
    """The attributes of a layer that reads and writes floats, without a residual."""
    fields = {name: attribute.value for name, attribute in layer.node.attributes.items()}
    return {n: v for n, v in fields.items() if not n.startswith(("output_", "residual_"))}


def _check_rows(layer: PackedLayer, threads: int) -> str:
    rows = np.array([0, layer.n - 1, layer.n // 2, -1], np.int64)
    fields = {name: attribute.value for name, attribute in layer.node.attributes.items()}
    found = _run_alone(layer, "Gather", fields, [], rows, threads)
    if not np.array_equal(found, weight_values(layer)[rows]):
        raise AfpqError("a picked row differs from the decoded table")
    return f"{len(rows)} rows equal to the last bit"


def _check_load(model: PackedModel, threads: int) -> str:
    session(str(model.path), threads=threads)
    missing = set(model.tensors()) ^ set(model.checksums)
    if missing:
        raise AfpqError(f"metadata afpq.checksums does not fit the tensors: {min(missing)!r}")
    return f"loads in onnxruntime with {len(model.layers)} afpq operators"


def _check_tensor(layer: PackedLayer, expected: dict[str, str], threads: int) -> list[Finding]:
    def stored() -> str:
        found = checksum(layer)
        if found != expected.get(layer.weight_name):
            raise AfpqError(f"{found} instead of {expected.get(layer.weight_name)}: file damaged")
        return found

    return [
        _attempt(layer.name, "checksum", stored),
        _attempt(layer.name, "codes", lambda: _check_codes(layer)),
        _attempt(layer.name, "decode", lambda: check_decode(layer, threads)),
    ]


def _check_codes(layer: PackedLayer) -> str:
    codes = unpack(layer.packed, layer.n, layer.k, layer.format.bits)
    if layer.format.signed and (codes == layer.format.num_magnitudes).any():
        raise AfpqError("a code is -0, which is never written")
    scale = layer.stored_scale.astype(np.float32)
    if layer.kind == "real" and not (np.isfinite(scale).all() and (scale > 0).all()):
        raise AfpqError("a scale is not a positive finite number")
    return f"{layer.format} [{layer.n}, {layer.k}], {layer.kind} {layer.granularity}"


def _attempt(layer: str, check: str, run: Callable[[], str]) -> Finding:
    try:
        return Finding(layer, check, True, run())
    except AfpqError as error:
        return Finding(layer, check, False, str(error))


def _run_alone(
    layer: PackedLayer,
    op: str,
    fields: dict[str, Any],
    more: list[ir.Value],
    x: npt.NDArray[Any] | None,
    threads: int,
) -> Floats:
    """The output of one operator that has this layer's weight, by onnxruntime; integer `x` comes last."""
    first = 0 if layer.op in ("Gather", "Unpack") else 1
    constants = [v for v in [*layer.node.inputs[first : first + 2], *more] if v is not None]
    copies = [ir.val(v.name or "", const_value=v.const_value) for v in constants]
    inputs = []
    if x is not None:
        kind = ir.TensorType(ir.DataType.from_numpy(x.dtype))
        inputs = [ir.val("x", type=kind, shape=ir.Shape(list(x.shape)))]
    operands = [*copies, *inputs] if op == "Gather" else [*inputs, *copies]
    node = ir.node(op, operands, fields, domain="afpq", name=layer.name)
    node.outputs[0].name = "y"
    made = ir.DataType.UINT8 if op == "ConvU8" else ir.DataType.FLOAT
    node.outputs[0].type = ir.TensorType(made)
    opsets = {"": 17, "afpq": 1}
    graph = ir.Graph(
        inputs,
        [node.outputs[0]],
        nodes=[node],
        initializers=copies,
        opset_imports=opsets,
        name="one",
    )
    data = ir.to_proto(ir.Model(graph, ir_version=8)).SerializeToString()
    feeds = {} if x is None else {"x": x}
    result = session(data, threads=threads).run(["y"], feeds)[0]
    return np.asarray(result, np.float32)


def _input(layer: PackedLayer) -> Floats:
    """Seeded normal numbers; where the format is static, so wide that one of twenty is clipped."""
    x = np.random.default_rng(0).standard_normal(_input_shape(layer)).astype(np.float32)
    if layer.activation_format is None or layer.activation_scale is None:
        return x
    largest = layer.activation_scale * layer.activation_format.max_integer
    return np.asarray(x * np.float32(largest / 2), np.float32)


def _as_read(layer: PackedLayer, x: Floats) -> npt.NDArray[np.float64]:
    """`x` rounded to the static format of the layer's input, if it has one."""
    if layer.activation_format is None or layer.input_format != str(layer.activation_format):
        return x.astype(np.float64)
    assert layer.activation_scale is not None
    rounded = fake_quantize(x, layer.activation_format, layer.activation_scale)
    return rounded.astype(np.float64)


def _input_shape(layer: PackedLayer) -> tuple[int, ...]:
    if layer.op == "MatMul":
        return (_ROWS, layer.k)
    kernel, strides, dilations, _ = _geometry(layer)
    channels = layer.k // int(np.prod(kernel)) * layer.groups
    extents = [(k - 1) * d + 1 + 2 * s for k, s, d in zip(kernel, strides, dilations, strict=True)]
    return (1, channels, *extents)


def _geometry(
    layer: PackedLayer,
) -> tuple[list[int], list[int], list[int], list[tuple[int, int]]]:
    """Kernel, strides, dilations, and (begin, end) pads of every axis."""
    fields = {name: attribute.value for name, attribute in layer.node.attributes.items()}
    kernel = [int(v) for v in fields["kernel_shape"]]
    strides = [int(v) for v in fields.get("strides", [1] * len(kernel))]
    dilations = [int(v) for v in fields.get("dilations", [1] * len(kernel))]
    auto = fields.get("auto_pad", "NOTSET")
    if auto.startswith("SAME"):
        pads = []
        for k, s, d in zip(kernel, strides, dilations, strict=True):
            extent = (k - 1) * d + 1 + 2 * s  # what _input_shape chose
            total = max((-(-extent // s) - 1) * s + (k - 1) * d + 1 - extent, 0)
            small, large = total // 2, total - total // 2
            pads.append((small, large) if auto == "SAME_UPPER" else (large, small))
        return kernel, strides, dilations, pads
    flat = [int(v) for v in fields.get("pads", [0] * 2 * len(kernel))]
    if auto == "VALID":
        flat = [0] * len(flat)
    return (
        kernel,
        strides,
        dilations,
        list(zip(flat[: len(kernel)], flat[len(kernel) :], strict=True)),
    )


def _product(
    layer: PackedLayer, x: npt.NDArray[np.float64], weight: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """The layer without bias and bounds, in float64."""
    if layer.op == "MatMul":
        return np.asarray(x @ weight.T)
    kernel, strides, dilations, pads = _geometry(layer)
    padded = np.pad(x, [(0, 0), (0, 0), *pads])
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    axes = tuple(range(2, 2 + len(kernel)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, spans, axis=axes)
    steps = [slice(None, None, s) for s in strides] + [slice(None, None, d) for d in dilations]
    every = (slice(None), slice(None), *steps)
    windows = windows[every]
    spatial = windows.shape[2 : 2 + len(kernel)]
    per_group = x.shape[1] // layer.groups
    # [groups, channel, positions, taps] -> [groups, positions, taps * channels]: stored order
    cut = windows[0].reshape(layer.groups, per_group, int(np.prod(spatial)), -1)
    rows = np.moveaxis(cut, 1, -1).reshape(layer.groups, int(np.prod(spatial)), layer.k)
    result = np.matmul(weight.reshape(layer.groups, -1, layer.k), rows.swapaxes(1, 2))
    return np.asarray(result.reshape(1, layer.n, *spatial))


def _bound(
    layer: PackedLayer, x: Floats, weight: npt.NDArray[np.float64], largest: float
) -> npt.NDArray[np.float64]:
    """How far an output of each channel may be from float64: [n]."""
    total = np.abs(weight).sum(axis=1)
    span = max(float(x.max()), 0.0) - min(float(x.min()), 0.0)
    levels = _LEVELS.get(layer.input_format)
    step = 0.0 if levels is None else span / levels
    # Integer sums are exact; planes are joined, scaled and offset in float32. With f32 every product rounds.
    operations = layer.k + 16
    rounding = operations * _HALF_ULP * (span * total * 2 + largest)
    return np.asarray(step / 2 * total * 1.001 + rounding + np.finfo(np.float32).tiny)


def _along_channels(
    layer: PackedLayer, values: npt.NDArray[np.float64], rank: int
) -> npt.NDArray[np.float64]:
    """Values [n] shaped to be added to an output."""
    return values if layer.op == "MatMul" else values.reshape((-1, *[1] * (rank - 2)))
