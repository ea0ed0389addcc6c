"""Ways to make a network of few bits, ready to run: afpq, simulated roundings, and onnxruntime's quantizers."""

import contextlib
import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import numpy_helper
from onnxruntime import quantization
from onnxruntime.quantization import matmul_nbits_quantizer as nbits

import afpq
from accuracy.cases import Case
from accuracy.metrics import Run
from accuracy.roundings import ROUNDINGS
from afpq.data import open_data
from afpq.graph import Model, load_model
from afpq.runtime import FloatModel

__all__ = [
    "BLOCK",
    "Made",
    "NotRunnableError",
    "afpq_packed",
    "ort_int8",
    "ort_nbits",
    "quietly",
    "rounded",
    "write_int8",
]

CALIBRATION_SAMPLES = 64  # of onnxruntime's methods
BLOCK = 32  # weights that share a scale in MatMulNBits


@dataclass(frozen=True)
class Made:
    """A network of few bits, ready to run."""

    run: Run
    bits_per_weight: float
    size: int  # bytes: the file, or the weights alone where there is no file


class NotRunnableError(Exception):
    """A method cannot be applied to a network, or not here; the text says why."""


def afpq_packed(case: Case, bits: float, folder: Path) -> Made:
    model = afpq.quantize(case.model, data=case.calibration, preprocess=case.preprocess, bits=bits)
    size = model.save(folder / "packed.onnx")
    session = model.session()
    assert model.plan is not None
    return Made(lambda feed: session.run(None, feed)[0], model.plan.bits_per_weight, size)


def rounded(case: Case, method: str, bits: int) -> Made:
    model = load_model(case.model)
    weights, total = {}, 0
    for name, layer in model.tensors().items():
        weights[name], used = ROUNDINGS[method](layer.weight, bits)
        total += used
    network = FloatModel(model).simulate(weights)
    return Made(lambda feed: network.run(feed)[0], total / model.num_weights, -(-total // 8))


def write_int8(case: Case, method: str, out: Path) -> None:
    """onnxruntime's static int8 file: QDQ, weights per channel and activations."""
    prepared = out.with_name("prepared.onnx")
    quantization.quant_pre_process(str(case.model), str(prepared), skip_symbolic_shape=True)
    quantization.quantize_static(
        str(prepared),
        str(out),
        Reader(case),
        per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        calibrate_method=quantization.CalibrationMethod[method],
    )


def ort_int8(case: Case, method: str, folder: Path) -> Made:
    out = folder / f"{method}.onnx"
    with quietly(f"ort-int8 ({method})"):
        write_int8(case, method, out)
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = ort.InferenceSession(str(out), options, providers=["CPUExecutionProvider"])
    return Made(lambda feed: session.run(None, feed)[0], 8.0, out.stat().st_size)


def ort_nbits(case: Case, method: str, bits: int, folder: Path) -> Made:
    """`MatMulNBits` by onnxruntime's own rounding: `nearest`, `hqq`, or `gptq`, which has 4 bits only.

    Weights that other nodes read too, tables above all, stay float and count with 32 bits. GPTQ of onnxruntime 1.32
    gives what `nearest` gives: the error that it hands on is multiplied by the zero half of a triangular matrix.
    """
    model = load_model(case.model)
    if not any(layer.op_type == "MatMul" for layer in model.layers):
        raise NotRunnableError("the network has no MatMul with a constant")
    if method == "gptq" and bits != 4:
        raise NotRunnableError("onnxruntime's GPTQ has 4 bits only")
    out = folder / f"{method}{bits}.onnx"
    with quietly(f"MatMulNBits ({method}, {bits} bits)"):
        if method == "gptq":
            config = nbits.GPTQWeightOnlyQuantConfig(Reader(case))
        elif method == "hqq":
            config = nbits.HQQWeightOnlyQuantConfig(block_size=BLOCK, bits=bits)
        else:
            config = nbits.DefaultWeightOnlyQuantConfig(block_size=BLOCK, bits=bits)
        quantizer = nbits.MatMulNBitsQuantizer(
            onnx.load(case.model), bits=bits, block_size=BLOCK, algo_config=config
        )
        quantizer.process()
        onnx.save(quantizer.model.model, out)
        options = ort.SessionOptions()
        options.log_severity_level = 4  # a failure is raised; it need not be logged too
        session = ort.InferenceSession(str(out), options, providers=["CPUExecutionProvider"])
    used = stored_bits(model, quantizer.model.model.graph) / model.num_weights
    return Made(lambda feed: session.run(None, feed)[0], used, out.stat().st_size)


def stored_bits(model: Model, graph: onnx.GraphProto) -> int:
    """Bits of all weights: codes, scales and zero points of the `MatMulNBits`, and weights that stay float."""
    sizes = {entry.name: numpy_helper.to_array(entry).nbytes for entry in graph.initializer}
    changed = {node.output[0]: node for node in graph.node if node.op_type == "MatMulNBits"}
    packed = {name for node in changed.values() for name in node.input[1:]}
    nodes = list(model.ir.graph)
    kept = {
        layer.weight_name: layer.num_weights
        for layer in model.layers
        if nodes[layer.node_index].outputs[0].name not in changed
    }
    return 8 * sum(sizes.get(name, 0) for name in packed) + 32 * sum(kept.values())


class Reader(quantization.CalibrationDataReader):
    """Calibration samples one at a time; it can be copied and iterated, as some of the quantizers do."""

    def __init__(self, case: Case) -> None:
        model = load_model(case.model)
        data = open_data(case.calibration, model.inputs, preprocess=case.preprocess)
        self._feeds: list[dict[str, np.ndarray]] = list(data.take(CALIBRATION_SAMPLES).batches(1))
        self._next = 0

    def get_next(self) -> dict[str, np.ndarray] | None:
        self._next += 1
        return self._feeds[self._next - 1] if self._next <= len(self._feeds) else None


@contextlib.contextmanager
def quietly(what: str) -> Iterator[None]:
    """Hides what onnxruntime's quantizers print; their failures, of any type, become one line."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    except ImportError as error:
        raise NotRunnableError(f"{what} needs a package that is missing: {error}") from error
    except Exception as error:
        text = " ".join(str(error).split())[-160:]  # what is wrong comes last
        raise NotRunnableError(f"{what} fails: {type(error).__name__}: .. {text}") from error
    finally:
        logging.disable(logging.NOTSET)
