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

# drivers, for tests
def unpack(
    data: npt.NDArray[np.uint8],
    format: str,
    n: int,
    k: int,
    scales: npt.NDArray[np.float32],
    group_size: int,
) -> npt.NDArray[np.float32]: ...
def conv_is_planar(channels_in: int, channels_out: int, groups: int, num_taps: int) -> bool: ...

class kernels:  # a submodule: the raw kernel tables
    @staticmethod
    def isa_names() -> list[str]: ...
    @staticmethod
    def active_isa() -> str: ...
