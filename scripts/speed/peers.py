"""onnxruntime's own quantizers of matrix products, which need no data."""

from pathlib import Path

import onnx
from onnxruntime import quantization
from onnxruntime.quantization import matmul_nbits_quantizer as nbits

from accuracy.runtimes import BLOCK

__all__ = ["write_dynamic_int8", "write_four_bits"]


def write_dynamic_int8(model: Path, out: Path) -> None:
    """Weights as int8 per channel, activations as the run finds them."""
    quantization.quantize_dynamic(model, out, per_channel=True)


def write_four_bits(model: Path, out: Path) -> None:
    """MatMulNBits in blocks of 32, accuracy level 4."""
    config = nbits.DefaultWeightOnlyQuantConfig(block_size=BLOCK, bits=4, accuracy_level=4)
    quantizer = nbits.MatMulNBitsQuantizer(
        onnx.load(model), bits=4, block_size=BLOCK, algo_config=config
    )
    quantizer.process()
    onnx.save(quantizer.model.model, out)
