"""What tests of exported models share: packed files to start from, and QONNX's operators by their definition."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from graphs import packed, write
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from afpq.graph import load_model
from afpq.packing import PackedTensor, pack
from afpq.plan import ActivationEntry
from afpq.rewrite import rewrite, save

QONNX = "qonnx.custom_op.general"

NEW_ENOUGH = pytest.mark.skipif(
    ort.__version__.startswith("1.17."),
    reason="onnxruntime 1.17 knows opsets to 20, and computes wrong numbers from DequantizeLinear before Gather",
)


@dataclass(frozen=True)
class Summary:
    """What a file says of its plan."""

    activations: tuple[ActivationEntry, ...] | None = None
    plan_hash: str = "ab" * 32
    bits_per_weight: float = 5.0


def close(result, expected):
    """Equal to the rounding of float32 sums; float16 results of either side are rounded once more."""
    eps = 2e-3 if result.dtype == np.float16 else 1e-5
    np.testing.assert_allclose(result, expected, rtol=0, atol=eps * np.abs(expected).max())


def per_tensor(tensor: PackedTensor) -> PackedTensor:
    """The same codes under the first scale alone."""
    return PackedTensor(
        tensor.format, tensor.n, tensor.k, tensor.data, tensor.scale[:1], tensor.kind
    )


def every_code(tensor: PackedTensor) -> PackedTensor:
    """Random codes of the whole format under the same scales."""
    fmt = tensor.format
    codes = np.random.default_rng(2).integers(0, 1 << fmt.bits, (tensor.n, tensor.k), np.uint8)
    codes[codes == fmt.num_magnitudes] = 0  # -0 is never written
    data = pack(codes, fmt.bits)
    return PackedTensor(fmt, tensor.n, tensor.k, data, tensor.scale, tensor.kind, tensor.group_size)


def pack_case(folder: Path, proto: onnx.ModelProto, *, change=None, activations="f32", **options):
    """Packs all layers of a model and writes it: the path, the float model, and the packed tensors by name."""
    model = load_model(write(folder, proto))
    tensors = {name: packed(layer, **options) for name, layer in model.tensors().items()}
    if change is not None:
        tensors = {name: change(tensor) for name, tensor in tensors.items()}
    path = folder / "packed.onnx"
    save(rewrite(model, Summary(), tensors, activations=activations), path)
    return path, model, tensors


def run(path: Path, feeds) -> list[np.ndarray]:
    """The outputs by onnxruntime as any user has it, but with products in float32."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


class FloatQuant(OpRun):
    """Version 1 in the words of its page: a float of `exponent` and `mantissa` bits, saturating, ties to even."""

    op_domain = QONNX

    def _run(self, x, scale, exponent, mantissa, exponent_bias, max_val, **_):
        scaled = x / scale
        smallest = 1 - exponent_bias - mantissa
        power = np.floor(np.log2(np.abs(scaled), where=scaled != 0, out=np.zeros_like(scaled)))
        unit = np.exp2(np.maximum(power - mantissa, smallest))
        largest = (2 - np.exp2(-mantissa)) * np.exp2(np.exp2(exponent) - 1 - exponent_bias)
        largest = np.minimum(largest, max_val)
        rounded = np.clip(unit * np.rint(scaled / unit), -largest, largest)
        return ((rounded * scale).astype(np.float32),)


class IntQuant(OpRun):
    """Version 1: integers of `bits` bits around a zero point."""

    op_domain = QONNX

    def _run(self, x, scale, zero_point, bits, narrow=1, signed=1, rounding_mode="ROUND"):
        assert (narrow, signed, rounding_mode) == (1, 1, "ROUND")
        largest = np.exp2(bits - 1) - 1
        codes = np.rint(np.clip(x / scale + zero_point, -largest, largest))
        return (((codes - zero_point) * scale).astype(np.float32),)


def evaluate(path: Path, feeds, names=None) -> list[np.ndarray]:
    """Outputs, or any tensors, by onnx's reference evaluator."""
    proto = onnx.load(path)
    if names is not None:
        del proto.graph.output[:]
        proto.graph.output.extend(onnx.helper.make_empty_tensor_value_info(n) for n in names)
    return ReferenceEvaluator(proto, new_ops=[FloatQuant, IntQuant]).run(None, feeds)


def stored_weights(path: Path) -> dict[str, np.ndarray]:
    """The float32 operands that stand for packed tensors, by the tensor's name; feeds no input."""
    proto = onnx.load(path)
    values = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    made = [
        n for n in proto.graph.node if n.op_type in ("DequantizeLinear", "FloatQuant", "IntQuant")
    ]
    graph = onnx.helper.make_graph(
        made,
        "operands",
        [],
        [onnx.helper.make_empty_tensor_value_info(n.output[0]) for n in made],
        list(proto.graph.initializer),
    )
    opsets = {o.domain: o.version for o in proto.opset_import}
    opsets[""] = max(opsets[""], 19)  # the evaluator has no older DequantizeLinear
    model = onnx.helper.make_model(
        graph,
        opset_imports=[onnx.helper.make_opsetid(*item) for item in opsets.items()],
        ir_version=max(proto.ir_version, 9),
    )
    results = ReferenceEvaluator(model, new_ops=[FloatQuant, IntQuant]).run(None, {})
    values |= dict(zip([n.input[0] for n in made], results, strict=True))
    return {name: value for name, value in values.items() if name.startswith("q")}
