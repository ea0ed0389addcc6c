"""Runs models through onnxruntime: packed ones with the custom-op library, float ones with tensors swapped.

A float model never goes through the runtime's file reader: its graph is serialized once without the large constants,
which are handed over as arrays. So models over 2 GB run from memory, and a simulation copies no graph.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from afpq._float_graph import FloatGraph
from afpq.errors import ModelError, RuntimeUnavailableError
from afpq.graph import Model, original_layout

__all__ = ["FloatModel", "Simulation", "ort_library_path", "session"]

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]

_KEPT_SESSIONS = 4
_WARNINGS_OFF = 3


def ort_library_path() -> str:
    """Path of the custom-op library, for `SessionOptions.register_custom_ops_library`.

    Raises:
        RuntimeUnavailableError: the library was not built.

    Example:
        >>> import onnxruntime
        >>> options = onnxruntime.SessionOptions()
        >>> options.register_custom_ops_library(afpq.ort_library_path())
    """
    suffix = ".dylib" if sys.platform == "darwin" else ".dll" if sys.platform == "win32" else ".so"
    path = Path(__file__).parent / f"libafpq_ort{suffix}"
    try:
        import afpq._core

        path = Path(str(afpq._core.__file__)).parent / path.name
    except ImportError:
        pass  # the custom ops do not need the extension module
    if not path.is_file():
        raise RuntimeUnavailableError(
            f"the custom-op library {path} is missing; install afpq from a wheel, or build it with "
            "'pip install .' (afpq doctor tells what loads)"
        )
    return str(path)


def session(
    model: str | Path | bytes,
    *,
    threads: int = 0,
    ops: bool = True,
    profile: str | Path | None = None,
) -> ort.InferenceSession:
    """An onnxruntime session on the CPU, with the afpq operators registered if `ops`; threads 0 = one a core.

    `profile` is the beginning of the path of a file to which onnxruntime writes how long every node took.

    Raises:
        ModelError: onnxruntime refuses the model.
        RuntimeUnavailableError: the custom-op library is missing or does not load.
    """
    options = _options(threads)
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    if ops:
        path = ort_library_path()
        try:
            options.register_custom_ops_library(path)
        except Exception as error:  # onnxruntime raises bare RuntimeError and its own kinds
            raise RuntimeUnavailableError(
                f"onnxruntime {ort.__version__} cannot load {path}: {_message(error)}"
            ) from error
    what = "the model" if isinstance(model, bytes) else str(model)
    return _start(what, model if isinstance(model, bytes) else str(model), options)


class FloatModel:
    """Runs the float graph of a model, whole or up to any tensor, and with some weights replaced.

    Sessions are kept for the few sets of outputs that were asked for last.
    """

    def __init__(self, model: Model, *, threads: int = 0) -> None:
        self.model = model
        self._threads = threads
        self._outputs = tuple(info.name for info in model.outputs)
        self._sessions: dict[tuple[str, ...], Simulation] = {}

    def run(self, feeds: Feeds, fetch: Sequence[str] | None = None) -> list[Array]:
        """The values of the tensors called `fetch` (any in the main graph; the model's outputs if None), in order.

        Raises:
            ModelError: a name is no tensor of the graph, or onnxruntime refuses the model or the feeds.
        """
        names = self._outputs if fetch is None else tuple(fetch)
        fed = {info.name for info in self.model.inputs}
        computed = tuple(dict.fromkeys(name for name in names if name not in fed))
        values = dict(feeds)
        if computed:
            values |= zip(computed, self._session(computed).run(feeds), strict=True)
        return [values[name] for name in names]

    def simulate(
        self,
        weights: Mapping[str, npt.NDArray[np.float32]],
        biases: Mapping[str, npt.NDArray[np.float32]] | None = None,
        *,
        constants: Mapping[str, Array] | None = None,
        fetch: Sequence[str] | None = None,
        given: Mapping[str, Array] | None = None,
    ) -> "Simulation":
        """The float network with other weights ([n, k] by weight_name) and biases ([n] by layer name).

        `constants` replace other initializers of the main graph, by name and of the same shape. It computes the tensors
        called `fetch`, the model's outputs if None, and only what these need. Tensors called `given` are fed like
        inputs instead of being computed; their values here only tell type and rank.

        Raises:
            ModelError: a name or a shape is not one of the model's, or a bias goes to a gather or unpack layer.
        """
        outputs = self._outputs if fetch is None else tuple(fetch)
        if fetch is not None or given or constants:
            graph = FloatGraph(
                self.model,
                fetch=outputs,
                given=given or {},
                slots=True,
                biases=bool(biases),
                constants=constants or {},
            )
        else:
            graph = self._biased if biases else self._plain
        tensors = self.model.tensors()
        for name, weight in weights.items():
            if name not in tensors:
                raise ModelError(f"{self.model.path}: no weight is called {name!r}")
            if weight.shape != tensors[name].weight.shape:
                raise ModelError(
                    f"weight {name!r} has shape {tensors[name].weight.shape}, got {weight.shape}"
                )
        changed: dict[str, Array] = {}
        for slot, layer in graph.weight_slots.items():
            if layer.weight_name in weights:
                operand = original_layout(layer, weights[layer.weight_name])
                changed[slot] = operand.astype(layer.dtype, copy=False)
        for name, bias in (biases or {}).items():
            if name not in graph.bias_slots:
                raise ModelError(f"{self.model.path}: no layer {name!r} that can take a bias")
            slot, shape, dtype = graph.bias_slots[name]
            if bias.size != np.prod(shape, dtype=np.int64):
                raise ModelError(f"bias of {name!r} has shape {shape}, got {bias.shape}")
            changed[slot] = np.ascontiguousarray(bias, dtype).reshape(shape)
        return self._start(graph, outputs, changed)

    def _session(self, fetch: tuple[str, ...]) -> "Simulation":
        if fetch in self._sessions:
            self._sessions[fetch] = self._sessions.pop(fetch)  # most recent last
            return self._sessions[fetch]
        graph = self._source if fetch == self._outputs else FloatGraph(self.model, fetch=fetch)
        result = self._sessions[fetch] = self._start(graph, fetch, {})
        while len(self._sessions) > _KEPT_SESSIONS:
            del self._sessions[next(iter(self._sessions))]
        return result

    def _start(
        self, graph: FloatGraph, outputs: tuple[str, ...], changed: Mapping[str, Array]
    ) -> "Simulation":
        options = _options(self._threads)
        values = {
            name: ort.OrtValue.ortvalue_from_numpy(changed[name]) if name in changed else value
            for name, value in graph.constants.items()
        }
        options.add_external_initializers(list(values), list(values.values()))
        started = _start(str(self.model.path), graph.proto, options)
        return Simulation(started, outputs, tuple(values.values()))

    @cached_property
    def _source(self) -> FloatGraph:
        return FloatGraph(self.model)

    @cached_property
    def _plain(self) -> FloatGraph:
        return FloatGraph(self.model, slots=True)

    @cached_property
    def _biased(self) -> FloatGraph:
        return FloatGraph(self.model, slots=True, biases=True)


class Simulation:
    """A started float network."""

    def __init__(
        self, started: ort.InferenceSession, outputs: tuple[str, ...], owned: Iterable[object]
    ) -> None:
        self._session = started
        self._outputs = outputs
        self._owned = tuple(owned)  # the session reads these arrays in place
        self._accepted = {i.name for i in started.get_inputs()}

    def run(self, feeds: Feeds) -> list[Array]:
        """The outputs for one batch.

        Raises:
            ModelError: onnxruntime refuses the feeds.
        """
        wanted = {name: value for name, value in feeds.items() if name in self._accepted}
        try:
            return list(self._session.run(list(self._outputs), wanted))
        except Exception as error:
            raise ModelError(
                f"onnxruntime cannot run the float model: {_message(error)}"
            ) from error


def _options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = _WARNINGS_OFF
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    return options


def _start(what: str, model: str | bytes, options: ort.SessionOptions) -> ort.InferenceSession:
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a kind of its own for every status
        raise ModelError(f"onnxruntime cannot load {what}: {_message(error)}") from error


def _message(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
