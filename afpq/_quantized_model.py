"""A packed model, as `quantize` makes and `load` opens it: saved, reported, run and compared."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime as ort

from afpq._build import session_of
from afpq._examine import Reference, examine
from afpq._job import Job
from afpq._probe import Feeds
from afpq._written import save_checked, try_file
from afpq.errors import ModelError
from afpq.evaluate import Comparison, compare
from afpq.packed import PackedModel, describe_packed, file_bytes, is_packed, read_ir
from afpq.plan import Plan
from afpq.report import RunFacts, build_report, write_report
from afpq.runtime import session

__all__ = ["QuantizedModel", "load"]

Progress = Callable[[str, int, int], None]


@dataclass(eq=False)
class QuantizedModel:
    """A packed model in memory, or one that `load` opened. `plan` is None after `load`."""

    packed: ir.Model = field(repr=False)
    plan: Plan | None
    facts: RunFacts
    path: Path | None = None  # where it lies on disk, once saved or loaded
    probe: Feeds | None = field(default=None, repr=False)  # one input, to run a saved file once
    job: Job | None = field(default=None, repr=False)  # what it was made from; None after `load`

    def save(self, path: str | Path) -> int:
        """Writes the file, loads it again, runs it once, and only then gives it its name; returns its bytes.

        Raises:
            ModelError: it cannot be written, or onnxruntime cannot load or run it. Nothing is left behind then.

        Example:
            >>> model = afpq.quantize("models/lenet5_digits.onnx", bits=6)
            >>> model.save("lenet5.onnx") == Path("lenet5.onnx").stat().st_size
            True
        """
        path = Path(path)
        size, checks = save_checked(self.packed, path, lambda file: try_file(file, self.probe))
        self.path = path
        self.facts = replace(self.facts, checks={**self.facts.checks, **checks})
        return size

    def report(self, path: str | Path, *, progress: Progress | None = None) -> None:
        """Writes the report, HTML, Markdown or JSON by the suffix; measures speed and single layers for it.

        Raises:
            AfpqError: the suffix is not known, or the model was not saved.

        Example:
            >>> model = afpq.quantize("models/lenet5_digits.onnx", data="models/digits_calibration.npz", mode="quick")
            >>> bytes_written = model.save("lenet5.onnx")
            >>> model.report("lenet5.html")
        """
        write_report(build_report(self._described(), self._examined(progress)), path)

    def summary(self) -> dict[str, Any]:
        """The report as a dictionary.

        Raises:
            ModelError: the model was not saved.

        Example:
            >>> model = afpq.quantize("models/lenet5_digits.onnx", bits=6)
            >>> bytes_written = model.save("lenet5.onnx")
            >>> len(model.summary()["layers"])
            5
        """
        return build_report(self._described(), self.facts)

    def session(self, *, threads: int = 0) -> ort.InferenceSession:
        """An onnxruntime session of it.

        Example:
            >>> session = afpq.quantize("models/lenet5_digits.onnx", bits=6).session(threads=1)
            >>> [output.name for output in session.get_outputs()]
            ['logits']
        """
        if self.path is not None:
            return session(self.path, threads=threads)
        return session_of(self.packed, threads)

    def compare(
        self,
        reference: str | Path | ort.InferenceSession,
        data: object,
        *,
        preprocess: str | None = None,
        limit: int | None = None,
        threads: int = 0,
        progress: Progress | None = None,
    ) -> Comparison:
        """Accuracy next to the float model, on samples that neither calibration nor search has seen.

        Raises:
            ModelError: a model cannot be run, or the two do not fit each other.
            DataError: the data does not fit the reference.

        Example:
            >>> model = afpq.quantize("models/lenet5_digits.onnx", data="models/digits_calibration.npz", bits=5)
            >>> result = model.compare("models/lenet5_digits.onnx", "models/digits_evaluation.npz")
            >>> result.outputs[0].kl < 0.01
            True
        """
        return compare(
            reference,
            self.session(threads=threads),
            data,
            preprocess=preprocess,
            limit=limit,
            threads=threads,
            progress=progress,
        )

    def _described(self) -> PackedModel:
        if self.path is None:
            raise ModelError("save the model before its report: the report measures the file")
        return describe_packed(self.packed, self.path, file_bytes(self.path, read_ir(self.path)))

    def _examined(self, progress: Progress | None) -> RunFacts:
        job = self.job
        reference = None
        if job is not None:
            reference = Reference(job.model, job.held_out, f"{job.data_name} (held out)")
        return examine(
            self._described(),
            self.facts,
            reference=reference,
            feeds=self.probe,
            threads=0 if job is None else job.threads,
            progress=progress,
        )


def load(path: str | Path) -> QuantizedModel:
    """Opens a packed file: nothing else is needed.

    Raises:
        ModelError: it cannot be read, or is not packed by afpq.

    Example:
        >>> bytes_written = afpq.quantize("models/lenet5_digits.onnx", bits=6).save("lenet5.onnx")
        >>> session = afpq.load("lenet5.onnx").session()
        >>> session.run(None, {"input": np.zeros((1, 1, 28, 28), np.float32)})[0].shape
        (1, 10)
    """
    model = read_ir(path)
    if not is_packed(model):
        raise ModelError(f"{path}: not a packed model (no operator of the domain afpq)")
    return QuantizedModel(packed=model, plan=None, facts=RunFacts(), path=Path(path))
