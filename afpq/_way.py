"""What one way of rounding and correcting makes of a plan, and its file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from afpq._array_files import load_npz
from afpq.formats import AfpFormat
from afpq.packing import PackedTensor

__all__ = ["Way"]

Floats = npt.NDArray[np.float32]

_TENSOR_FIELDS = ("n", "k", "kind", "group_size")


@dataclass(frozen=True, eq=False)
class Way:
    """Rounded tensors by weight_name, and what changes beside them."""

    tensors: Mapping[str, PackedTensor]
    biases: Mapping[str, Floats]  # by layer name
    sqnr: Mapping[str, float]  # dB, by weight_name
    constants: Mapping[str, Floats] = field(default_factory=dict)  # by name in the graph
    left: tuple[str, ...] = ()  # layers that had to stay at nearest rounding

    def save(self, path: Path) -> None:
        """Writes it as an `.npz` that `load` reads, whatever the suffix."""
        meta: dict[str, Any] = {
            "tensors": {
                name: {"format": str(t.format), **{f: getattr(t, f) for f in _TENSOR_FIELDS}}
                for name, t in self.tensors.items()
            },
            "biases": list(self.biases),
            "constants": list(self.constants),
            "sqnr": dict(self.sqnr),
            "left": self.left,
        }
        arrays: dict[str, npt.NDArray[Any]] = {"meta": np.array(json.dumps(meta))}
        for number, tensor in enumerate(self.tensors.values()):
            arrays |= {f"data.{number}": tensor.data, f"scale.{number}": tensor.scale}
        for kind in ("biases", "constants"):
            values = getattr(self, kind).values()
            arrays |= {f"{kind}.{number}": value for number, value in enumerate(values)}
        with path.open("wb") as stream:
            np.savez(stream, allow_pickle=False, **arrays)

    @staticmethod
    def load(path: Path) -> "Way":
        """Reads what `save` wrote.

        Raises:
            DataError: the file is not one.
        """
        arrays = {name: np.array(value) for name, value in load_npz(path).items()}
        meta = json.loads(str(arrays["meta"]))
        tensors = {
            name: PackedTensor(
                AfpFormat.parse(fields.pop("format")),
                data=arrays[f"data.{number}"],
                scale=arrays[f"scale.{number}"],
                **fields,
            )
            for number, (name, fields) in enumerate(meta["tensors"].items())
        }
        biases, constants = (
            {name: arrays[f"{kind}.{number}"] for number, name in enumerate(meta[kind])}
            for kind in ("biases", "constants")
        )
        return Way(tensors, biases, meta["sqnr"], constants, tuple(meta["left"]))
