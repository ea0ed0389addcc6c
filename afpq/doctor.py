"""Says what of afpq works on this machine: versions, native code, the custom-op library, kernels; and how fast it is.

A check never raises; what failed is in its text, with what to do.
"""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir

from afpq.errors import AfpqError
from afpq.formats import AfpFormat, encode
from afpq.packed import PackedLayer
from afpq.packing import pack
from afpq.rates import RATE_FORMATS, RATE_MODES
from afpq.report import environment

__all__ = ["Check", "LineTimes", "doctor", "line_times", "measure", "memory_rate", "product_rate"]


@dataclass(frozen=True)
class Check:
    """One line of the diagnosis."""

    name: str
    passed: bool
    detail: str


def doctor() -> list[Check]:
    """Every check, in the order in which one builds on another."""
    versions = environment()
    checks = [Check(name, True, str(value)) for name, value in versions.items() if name != "isa"]
    checks += [
        _attempt("native extension", _check_core),
        _attempt("instruction sets", _check_isa),
        _attempt("images (Pillow)", _check_pillow, needed=False),
        _attempt("custom-op library", _check_library),
        _attempt("kernels", _check_kernels),
        _attempt("layers", _check_products),
    ]
    return checks


def measure() -> tuple[list[Check], dict[str, dict[str, float]]]:
    """What this machine can do, in a few seconds: peaks that layers are held against, and rates for `afpq.rates`.

    The rates are 10^9 products a second of every kind of format, by the way to round activations. One thread.
    """
    rates: dict[str, dict[str, float]] = {mode: {} for mode in RATE_MODES}

    def layer(text: str, mode: str) -> str:
        rate = rates[mode][text] = round(_layer_rate(text, mode) / 1e9, 1)
        return f"{rate} GMAC/s, decoding and rounding included"

    checks = [
        _attempt("memory", lambda: f"{memory_rate() / 1e9:.1f} GB/s read"),
        _attempt("products", lambda: f"{product_rate() / 1e9:.1f} GMAC/s of bytes that stay in L1"),
        _attempt("float32", lambda: f"{_float_rate() / 1e9:.1f} GMAC/s, onnxruntime's MatMul"),
        _attempt("two cores", _lines_between_cores, needed=False),
        *(
            _attempt(f"{text} {mode}", partial(layer, text, mode))
            for text in RATE_FORMATS
            for mode in RATE_MODES
        ),
    ]
    return checks, rates


def _attempt(name: str, check: Callable[[], str], *, needed: bool = True) -> Check:
    try:
        return Check(name, True, check())
    except (AfpqError, ImportError, ValueError) as error:
        text = " ".join(str(error).split())
        return Check(name, not needed, text if needed else f"not available: {text}")


def _check_core() -> str:
    from afpq import _core

    return Path(_core.__file__ or "").name


def _check_isa() -> str:
    from afpq._core import kernels

    forced = os.environ.get("AFPQ_ISA")
    how = "forced by AFPQ_ISA" if forced else "the best here"
    return f"{kernels.active_isa()} ({how}; supported: {', '.join(kernels.isa_names())})"


def _check_pillow() -> str:
    import PIL

    return f"{PIL.__version__}"


def _check_library() -> str:
    from afpq.runtime import ort_library_path, session

    path = ort_library_path()
    session(_identity_model())
    return f"{Path(path).name} loads in onnxruntime"


def _check_kernels() -> str:
    """All that the processor can run, whatever AFPQ_ISA says."""
    from afpq._core import kernels
    from afpq._selftest import differing_kernels, kernel_names

    isas = [isa for isa in kernels.isa_names() if isa != "scalar"]
    for isa in isas:
        if wrong := differing_kernels(isa):
            raise AfpqError(f"{isa}: {', '.join(wrong)} give other bits than the scalar kernels")
    return f"{len(set(kernel_names()))} kernels of {', '.join(isas) or 'scalar'} give the bits of scalar"


_SECONDS = 0.25  # of one measurement


def _best_time(run: Callable[[], object]) -> float:
    run()
    times: list[float] = []
    start = time.perf_counter()
    while time.perf_counter() - start < _SECONDS or len(times) < 3:
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return min(times)


def memory_rate(threads: int = 1) -> float:
    """Bytes a second that threads read together, of more than the caches hold."""
    array = np.ones(1 << 24, np.uint64)
    with ThreadPoolExecutor(threads) as pool:
        return array.nbytes / _best_time(lambda: list(pool.map(np.max, np.split(array, threads))))


def product_rate() -> float:
    """Products a second of the kernel of bytes, on operands in the first cache. One thread."""
    from afpq import _core

    calls, isa = 2000, _core.kernels.active_isa()
    seconds = min(_core.time_products(isa, calls) for _ in range(20))
    return 6 * 64 * 256 * calls / seconds


class LineTimes(NamedTuple):
    """Seconds a line of a cache takes, where there are many: what small layers wait for with more threads than one."""

    own: float  # written, and no other core has it
    read: float  # read behind the core that wrote it
    shared: float  # written when both cores have read it
    halves: float  # written and read again by the same core, beside lines of the other: half of 24 lines each
    apart: float  # the same where each core has 24 lines


def line_times() -> LineTimes:
    """Medians over 16 KB that two threads pass to each other, and over 144 KB of which each has a half.

    Raises:
        AfpqError: this process may use only one processor, or start no thread.
    """
    from afpq import _core

    if _num_processors() < 2:
        raise AfpqError("there is only one processor")
    try:
        halves, apart = (_core.time_halves(96, 24, whole, 1000) for whole in (False, True))
        return LineTimes(*_core.time_lines(256, 4000), halves, apart)
    except RuntimeError as error:
        raise AfpqError(f"no second thread: {error}") from error


def _num_processors() -> int:
    """Those that this process may use, where the system tells them apart from all."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _lines_between_cores() -> str:
    own, read, shared, halves, apart = (1e9 * seconds for seconds in line_times())
    return (
        f"{own:.1f} ns to write a line, {read:.1f} to read it elsewhere, {shared:.1f} to write it behind both, "
        f"{halves:.1f} beside lines of the other core, {apart:.1f} apart from them"
    )


_N, _ROWS = 512, 256  # of a layer that fits the caches


def _float_rate() -> float:
    from afpq.runtime import session

    rng = np.random.default_rng(0)
    weight = ir.val("w", const_value=ir.Tensor(rng.random((_N, _N), np.float32), name="w"))
    x = ir.val("x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([_ROWS, _N]))
    node = ir.node("MatMul", [x, weight])
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    opsets = {"": 17}
    graph = ir.Graph(
        [x], node.outputs, nodes=[node], initializers=[weight], opset_imports=opsets, name="layer"
    )
    opened = session(ir.to_proto(ir.Model(graph, ir_version=8)).SerializeToString(), threads=1)
    feed = {"x": rng.random((_ROWS, _N), np.float32)}
    return _ROWS * _N * _N / _best_time(lambda: opened.run(None, feed))


def _layer_rate(text: str, mode: str) -> float:
    from afpq import _core
    from afpq.rounding import best_scale

    rng = np.random.default_rng(0)
    fmt = AfpFormat.parse(text)
    # Weights as networks have them: how large their sums get decides which kernels may run.
    weight, x = (rng.standard_normal((n, _N)).astype(np.float32) for n in (_N, _ROWS))
    scale = np.array([best_scale(weight, fmt)[0]], np.float32)
    data, isa = pack(encode(weight, fmt, scale[0]), fmt.bits), _core.kernels.active_isa()
    out, sums = np.zeros((_ROWS, _N), np.float32), _core.column_sums(isa, data, text, _N, _N, 0, 1)

    def run() -> None:
        _core.matmul(
            isa, 1, x, data, text, _N, _N, scale, 0, None, mode, -np.inf, np.inf, sums=sums, out=out
        )

    return _ROWS * _N * _N / _best_time(run)


def _check_products() -> str:
    """A matrix product and the decoder in one format of each kernel class."""
    from afpq.verify import check_decode, check_run

    formats = [AfpFormat.parse(text) for text in ("e2m1", "e2m2", "e3m3", "e5m2")]
    for fmt in formats:
        layer = _layer(fmt)
        check_decode(layer)
        check_run(layer)
    return f"{', '.join(map(str, formats))} run as defined"


def _layer(fmt: AfpFormat) -> PackedLayer:
    from afpq.rewrite import pack_scale
    from afpq.rounding import best_scale, quantize_tensor

    weight = np.random.default_rng(0).standard_normal((20, 50)).astype(np.float32)
    scale, _ = best_scale(weight, fmt)
    tensor = quantize_tensor(weight, fmt, scale)
    stored = pack_scale(fmt, tensor.scale, tensor.kind, name="scale")
    values = [
        ir.val("weight", const_value=ir.Tensor(tensor.data, name="weight")),
        ir.val("scale", const_value=stored),
    ]
    fields: dict[str, Any] = {"format": str(fmt), "n": tensor.n, "k": tensor.k}
    node = ir.node("MatMul", [ir.val("x"), *values], fields, domain="afpq", name=f"{fmt}")
    return PackedLayer(
        name=f"{fmt}",
        op="MatMul",
        format=fmt,
        n=tensor.n,
        k=tensor.k,
        group_size=0,
        groups=1,
        activations="a16",
        weight_name="weight",
        scale_name="scale",
        output_name="y",
        packed=tensor.data,
        stored_scale=stored.numpy(),
        node=node,
    )


def _identity_model() -> bytes:
    x = ir.val("x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1]))
    node = ir.node("Identity", [x])
    node.outputs[0].name = "y"
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 17}, name="identity")
    return bytes(ir.to_proto(ir.Model(graph, ir_version=8)).SerializeToString())
