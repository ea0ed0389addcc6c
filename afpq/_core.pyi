import numpy as np
import numpy.typing as npt

# rounding
def search_scales(
    weight: npt.NDArray[np.float32],
    energy: npt.NDArray[np.float32] | None,
    format: str,
    kind: str,
    num_threads: int = 1,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64]]: ...
def scale_errors(
    weight: npt.NDArray[np.float32],
    energy: npt.NDArray[np.float32] | None,
    format: str,
    scales: npt.NDArray[np.float32],
    num_threads: int = 1,
) -> npt.NDArray[np.float64]: ...
def encode_rows(
    values: npt.NDArray[np.float32],
    format: str,
    scales: npt.NDArray[np.float32],
    num_threads: int = 1,
) -> npt.NDArray[np.uint8]: ...
def round_compensated(
    target: npt.NDArray[np.float32],
    second: npt.NDArray[np.float32],
    feedback: npt.NDArray[np.float32],
    format: str,
    kind: str,
    scales: npt.NDArray[np.float32],
    num_refits: int,
    num_threads: int = 1,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.float64]]: ...

# drivers; `out` is written to in place of a new array, `sums` are those of column_sums
def matmul(
    isa: str,
    threads: int,
    lhs: npt.NDArray[np.float32],
    data: npt.NDArray[np.uint8],
    format: str,
    n: int,
    k: int,
    scales: npt.NDArray[np.float32],
    group_size: int,
    bias: npt.NDArray[np.float32] | None,
    activations: str,
    low: float,
    high: float,
    activation_format: str = "",
    activation_scale: float = 0.0,
    sums: npt.NDArray[np.int32] | None = None,
    out: npt.NDArray[np.float32] | None = None,
) -> npt.NDArray[np.float32] | None: ...
def conv(
    isa: str,
    threads: int,
    x: npt.NDArray[np.float32],
    data: npt.NDArray[np.uint8],
    format: str,
    n: int,
    k: int,
    scales: npt.NDArray[np.float32],
    bias: npt.NDArray[np.float32] | None,
    activations: str,
    low: float,
    high: float,
    groups: int,
    kernel: list[int],
    strides: list[int],
    dilations: list[int],
    pads: list[int],
    extent: list[int],
    activation_format: str = "",
    activation_scale: float = 0.0,
    sums: npt.NDArray[np.int32] | None = None,
    out: npt.NDArray[np.float32] | None = None,
    residual: npt.NDArray[np.float32] | None = None,
) -> npt.NDArray[np.float32] | None: ...
def gather(
    threads: int,
    indices: npt.NDArray[np.int64],
    data: npt.NDArray[np.uint8],
    format: str,
    n: int,
    k: int,
    scales: npt.NDArray[np.float32],
    out: npt.NDArray[np.float32],
) -> None: ...
def unpack(
    data: npt.NDArray[np.uint8],
    format: str,
    n: int,
    k: int,
    scales: npt.NDArray[np.float32],
    group_size: int,
    out: npt.NDArray[np.float32] | None = None,
) -> npt.NDArray[np.float32] | None: ...
def column_sums(
    isa: str,
    data: npt.NDArray[np.uint8],
    format: str,
    n: int,
    k: int,
    group_size: int,
    multiple: int,
) -> npt.NDArray[np.int32]: ...
def conv_is_planar(
    channels_in: int, channels_out: int, groups: int, num_taps: int, is_static: bool
) -> bool: ...
def time_products(isa: str, calls: int) -> float: ...
def together_events(threads: int, most: int, failing: str) -> list[tuple[str, int, int]]: ...
def time_lines(count: int, rounds: int) -> tuple[float, float, float]: ...
def time_halves(runs: int, length: int, whole_runs: bool, rounds: int) -> float: ...

class kernels:  # a submodule: the raw kernel tables
    @staticmethod
    def isa_names() -> list[str]: ...
    @staticmethod
    def active_isa() -> str: ...

# training: `format` is what afpq.floats.kernel_numbers makes; without a seed rounding is to nearest
def round_values(
    isa: str,
    threads: int,
    format: tuple[float, float, float, float, int, int],
    seed: int | None,
    src: npt.NDArray[np.float32],
    dst: npt.NDArray[np.float32],
) -> None: ...
def multiply_rounded(
    isa: str,
    threads: int,
    format: tuple[float, float, float, float, int, int],
    seed: int | None,
    chunk: int,
    lhs: npt.NDArray[np.float32],
    rhs: npt.NDArray[np.float32],
    dst: npt.NDArray[np.float32],
) -> None: ...
