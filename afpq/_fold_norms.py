"""Takes BatchNormalization into the convolution before it, so that one operator computes both.

    gamma (w * x + b - mean) / sqrt(variance + epsilon) + beta = (g w) * x + (b - mean) g + beta,
    g = gamma / sqrt(variance + epsilon)

It happens before weights are rounded: scales of a packed weight hold 8 bits and no sign, so it could not be done after.
"""

from collections import Counter

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from afpq._fold import Constants, attribute, drop_constant, set_constants
from afpq.graph import Model, with_graph

__all__ = ["fold_batch_norms"]

Floats = npt.NDArray[np.float64]


def fold_batch_norms(model: Model) -> Model:
    """The model without each BatchNormalization that alone reads what a float32 convolution makes.

    The weight must be the convolution's own; other nodes stay. The same model if there is nothing to fold.

    Raises:
        ModelError: a folded weight or bias is not finite.
    """
    if all(node.op_type != "BatchNormalization" for node in model.ir.graph):
        return model
    changed = model.ir.clone()
    constants = Constants(changed.graph)
    nodes = list(changed.graph)
    users = Counter(layer.weight_name for layer in model.layers)
    folded = [
        _fold(constants, nodes[layer.node_index], layer.name)
        for layer in model.layers
        if layer.kind == "conv" and layer.dtype == "float32" and users[layer.weight_name] == 1
    ]
    return with_graph(model, changed) if any(folded) else model


def _fold(constants: Constants, conv: ir.Node, name: str) -> bool:
    """Folds what is behind one convolution; whether there was something."""
    made, weight = conv.outputs[0], conv.inputs[1]
    bias = conv.inputs[2] if len(conv.inputs) > 2 else None
    readers = tuple(made.uses())
    if conv.op_type != "Conv" or made.is_graph_output() or len(readers) != 1:
        return False
    norm, position = readers[0]
    if norm.op_type != "BatchNormalization" or norm.domain != "" or position != 0:
        return False
    if int(attribute(norm, "training_mode", 0)) or len(norm.outputs) != 1:
        return False
    if weight is None or not weight.is_initializer() or len(weight.uses()) != 1:
        return False
    values = [constants.value(value) for value in (weight, *norm.inputs[1:5])]
    before = None if bias is None else constants.value(bias)
    if any(value is None for value in values) or (bias is not None and before is None):
        return False
    w, gamma, beta, mean, variance = (np.asarray(value, np.float64) for value in values)
    spread = variance + float(attribute(norm, "epsilon", 1e-5))
    if any(v.shape != (len(w),) for v in (gamma, beta, mean, spread)) or not (spread > 0).all():
        return False
    g = gamma / np.sqrt(spread)
    b = -mean if before is None else before.astype(np.float64) - mean
    graph = constants.graph
    set_constants(graph, {str(weight.name): w * g.reshape(-1, *[1] * (w.ndim - 1))})
    conv.resize_inputs(3)
    conv.replace_input_with(2, _constant(graph, f"{name}.bias", b * g + beta))
    # The convolution makes what the normalization made.
    result, operands = norm.outputs[0], [bias, *norm.inputs[1:]]
    made.name, made.type, made.shape = result.name, result.type, result.shape
    result.replace_all_uses_with(made, replace_graph_outputs=True)
    graph.remove(norm, safe=True)
    for operand in operands:
        drop_constant(constants, operand)
    return True


def _constant(graph: ir.Graph, name: str, array: Floats) -> ir.Value:
    """A new float32 initializer."""
    taken = set(graph.initializers) | {v.name for v in graph.inputs}
    taken |= {v.name for node in graph.all_nodes() for v in node.outputs}
    while name in taken:
        name += "_"
    value = ir.val(name, const_value=ir.tensor(array.astype(np.float32), name=name))
    graph.register_initializer(value)
    return value
