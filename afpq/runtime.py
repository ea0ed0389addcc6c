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
import onnx_ir as ir
import onnxruntime as ort

from afpq._fold import set_constants
from afpq.errors import ModelError, RuntimeUnavailableError
from afpq.graph import Layer, Model, original_layout

__all__ = ["FloatModel", "Simulation", "ort_library_path", "session"]

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]

_INLINE_BYTES = 1024  # smaller constants stay in the graph: shape arithmetic wants to see them
_KEPT_SESSIONS = 4
_WARNINGS_OFF = 3
_PLACEHOLDER = "afpq-in-memory"
_EXTERNAL_TYPES = frozenset(
    {
        ir.DataType.BOOL,
        ir.DataType.DOUBLE,
        ir.DataType.FLOAT,
        ir.DataType.FLOAT16,
        ir.DataType.INT32,
        ir.DataType.INT64,
        ir.DataType.INT8,
        ir.DataType.UINT8,
    }
)


def ort_library_path() -> str:
    """Path of the custom-op library, for `SessionOptions.register_custom_ops_library`.

    Raises:
        RuntimeUnavailableError: the library was not built.
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
    model: str | Path | bytes, *, threads: int = 0, ops: bool = True
) -> ort.InferenceSession:
    """An onnxruntime session on the CPU, with the afpq operators registered if `ops`; threads 0 = one a core.

    Raises:
        ModelError: onnxruntime refuses the model.
        RuntimeUnavailableError: the custom-op library is missing or does not load.
    """
    options = _options(threads)
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
            graph = _Graph(
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
        graph = self._source if fetch == self._outputs else _Graph(self.model, fetch=fetch)
        result = self._sessions[fetch] = self._start(graph, fetch, {})
        while len(self._sessions) > _KEPT_SESSIONS:
            del self._sessions[next(iter(self._sessions))]
        return result

    def _start(
        self, graph: "_Graph", outputs: tuple[str, ...], changed: Mapping[str, Array]
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
    def _source(self) -> "_Graph":
        return _Graph(self.model)

    @cached_property
    def _plain(self) -> "_Graph":
        return _Graph(self.model, slots=True)

    @cached_property
    def _biased(self) -> "_Graph":
        return _Graph(self.model, slots=True, biases=True)


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


class _Graph:
    """A serialized graph, and the constants that it leaves out by name.

    With `slots`, the weight operand of every layer is a constant of its own (`weight_slots`); with `biases`, so is the
    bias of every layer, added where there was none (`bias_slots`: name, shape and dtype by layer name).
    """

    def __init__(
        self,
        model: Model,
        *,
        fetch: tuple[str, ...] | None = None,
        given: Mapping[str, Array] | None = None,
        slots: bool = False,
        biases: bool = False,
        constants: Mapping[str, Array] | None = None,
    ) -> None:
        self.constants: dict[str, ort.OrtValue] = {}
        self.weight_slots: dict[str, Layer] = {}
        self.bias_slots: dict[str, tuple[str, tuple[int, ...], str]] = {}
        clone = model.ir.clone()
        self._graph = clone.graph
        self._nodes = list(clone.graph)
        set_constants(clone.graph, constants or {})
        if biases:  # first: the positions of nodes are those of the model
            for layer in model.layers:
                if layer.kind in ("matmul", "conv"):
                    self._add_bias_slot(layer)
        if slots:
            self._add_weight_slots(model.layers)
        for name, example in (given or {}).items():
            _make_input(model, clone.graph, name, example)
        if fetch is not None:
            _set_outputs(model, clone.graph, fetch)
        self._take_out_constants()
        self.proto = _serialize(model, clone)

    def _new_constant(self, name: str, array: Array) -> ir.Value:
        value = ir.val(name, const_value=ir.tensor(array, name=name))
        self._graph.register_initializer(value)
        return value

    def _add_weight_slots(self, layers: Iterable[Layer]) -> None:
        # Two layers share a slot only if they read the same operand the same way.
        slots: dict[tuple[ir.Value, str, float], ir.Value] = {}
        for layer in layers:
            node = self._nodes[layer.node_index]
            operand = node.inputs[layer.weight_input]
            assert operand is not None
            key = (operand, layer.weight_name, layer.alpha)
            if key not in slots:
                name = f"afpq.weight.{len(slots)}"
                base = original_layout(layer, layer.weight).astype(layer.dtype, copy=False)
                slots[key] = self._new_constant(name, base)
                self.weight_slots[name] = layer
            node.replace_input_with(layer.weight_input, slots[key])
            if layer.alpha != 1.0:
                node.attributes["alpha"] = ir.AttrFloat32("alpha", 1.0)

    def _add_bias_slot(self, layer: Layer) -> None:
        node = self._nodes[layer.node_index]
        name = f"afpq.bias.{len(self.bias_slots)}"
        channel_axis = -2 if layer.is_left and layer.k_axis == -2 else -1
        shape: tuple[int, ...] = (layer.n,) if channel_axis == -1 else (layer.n, 1)
        if layer.kind == "conv" and layer.conv is not None and layer.add_index is not None:
            shape = (layer.n, *[1] * len(layer.conv.kernel_shape))
        bias = np.zeros(layer.n, np.float32) if layer.bias is None else layer.bias
        slot = self._new_constant(name, bias.astype(layer.dtype).reshape(shape))
        self.bias_slots[layer.name] = (name, shape, layer.dtype)
        if layer.add_index is not None:
            add = self._nodes[layer.add_index]
            position = 1 if add.inputs[0] is node.outputs[0] else 0
            add.replace_input_with(position, slot)
        elif layer.kind == "conv" or (layer.op_type == "Gemm" and not layer.keeps_c):
            node.resize_inputs(3)
            node.replace_input_with(2, slot)
            if "beta" in node.attributes:
                node.attributes["beta"] = ir.AttrFloat32("beta", 1.0)
        else:
            self._insert_add(node, slot)

    def _insert_add(self, node: ir.Node, slot: ir.Value) -> None:
        output = node.outputs[0]
        add = ir.node("Add", [output, slot])
        result, name = add.outputs[0], output.name
        result.type, result.shape = output.type, output.shape
        uses = [use for use in output.uses() if use.node is not add]
        for user, position in uses:
            user.replace_input_with(position, result)
        for position, value in enumerate(self._graph.outputs):
            if value is output:
                self._graph.outputs[position] = result
        output.name, result.name = f"{name}.without_bias", name
        self._graph.insert_after(node, add)

    def _take_out_constants(self) -> None:
        slots = self.weight_slots.keys() | {name for name, _, _ in self.bias_slots.values()}
        for name, value in list(self._graph.initializers.items()):
            tensor = value.const_value
            if tensor is None:
                continue
            if not value.uses() and not value.is_graph_output():
                del self._graph.initializers[name]
            elif name in slots or (
                tensor.nbytes >= _INLINE_BYTES and tensor.dtype in _EXTERNAL_TYPES
            ):
                array = np.require(tensor.numpy(), requirements="C")
                self.constants[name] = ort.OrtValue.ortvalue_from_numpy(array)
                value.const_value = ir.ExternalTensor(
                    _PLACEHOLDER,
                    0,
                    tensor.nbytes,
                    tensor.dtype,
                    shape=ir.Shape(array.shape),
                    name=name,
                )


def _make_input(model: Model, graph: ir.Graph, name: str, example: Array) -> None:
    """Feeds the tensor called `name` instead of computing it; an input of the model is one already."""
    if any(value.name == name for value in graph.inputs):
        return
    computed = next((v for node in graph for v in node.outputs if v.name == name), None)
    if computed is None:
        raise ModelError(f"{model.path}: no tensor of the main graph is called {name!r}")
    computed.name = f"{name}.computed"
    fed = ir.val(
        name,
        dtype=ir.DataType.from_numpy(example.dtype),
        shape=[f"{name}.{axis}" for axis in range(example.ndim)],
    )
    computed.replace_all_uses_with(fed)
    graph.inputs.append(fed)


def _set_outputs(model: Model, graph: ir.Graph, fetch: tuple[str, ...]) -> None:
    """Makes exactly the tensors called `fetch` the outputs, and drops the nodes that no longer matter."""
    known = {v.name: v for node in graph for v in node.outputs if v.name}
    known |= {name: v for name, v in graph.initializers.items()}
    missing = [name for name in fetch if name not in known]
    if missing:
        raise ModelError(f"{model.path}: no tensor of the main graph is called {missing[0]!r}")
    graph.outputs[:] = [known[name] for name in fetch]
    for node in reversed(graph):
        if not any(v.uses() or v.is_graph_output() for v in node.outputs):
            graph.remove(node, safe=True)
    graph.inputs[:] = [v for v in graph.inputs if v.uses() or v.is_graph_output()]


def _serialize(model: Model, clone: ir.Model) -> bytes:
    for graph in (clone.graph, *clone.graph.subgraphs()):
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor) and str(tensor.location) != _PLACEHOLDER:
                value.const_value = ir.Tensor(np.array(tensor.numpy()), name=value.name)
    try:
        return bytes(ir.to_proto(clone).SerializeToString(deterministic=True))
    except ValueError as error:  # protobuf's limit of 2 GB
        raise ModelError(
            f"{model.path}: more than 2 GB of constants lie outside the initializers of the main graph"
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
