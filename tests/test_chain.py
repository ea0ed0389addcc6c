"""Which tensors convolutions pass to each other as bytes, and that this changes nothing but their form."""

from pathlib import Path
from typing import Any

import graphs
import numpy as np
import onnx
import pytest

import afpq
from afpq.evaluate import compare
from afpq.export import export
from afpq.verify import verify

CHANNELS = 8


def conv(x: str, y: str, channels: int = CHANNELS, **fields: Any) -> tuple[Any, dict[str, Any]]:
    """A 3x3 convolution that keeps the extents: its node and its weight."""
    groups = fields.get("group", 1)
    weight = graphs.constant(CHANNELS, channels // groups, 3, 3, seed=len(y) * 7 + ord(y[-1]))
    fields = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], **fields}
    weight *= np.float32(0.7 / np.sqrt(weight[0].size))
    return graphs.node("Conv", f"{x} {y}_w", y, **fields), {f"{y}_w": weight}


def network(*parts: Any) -> tuple[list[Any], dict[str, Any]]:
    """Nodes and weights of a network from convolutions and other nodes."""
    nodes, constants = [], {}
    for part in parts:
        node, weights = part if isinstance(part, tuple) else (part, {})
        nodes.append(node)
        constants |= weights
    return nodes, constants


class Built:
    """A network with and without bytes between its convolutions."""

    def __init__(self, folder: Path, nodes: Any, constants: Any, outputs: Any = ("y",)) -> None:
        shape = ["N", CHANNELS, 12, 10]
        model = graphs.build(nodes, {"x": shape}, constants, outputs)
        self.source = graphs.write(folder, model)
        self.data = np.random.default_rng(0).standard_normal((24, *shape[1:])).astype(np.float32)
        options = dict(data={"x": self.data}, bits=6, activations="a8")
        self.chained = folder / "chained.onnx"
        self.model = afpq.quantize(self.source, **options)
        self.model.save(self.chained)
        self.plain = folder / "plain.onnx"
        afpq.quantize(self.source, **options, chain=False).save(self.plain)
        self.nodes = list(onnx.load(self.chained).graph.node)

    def ops(self) -> list[str]:
        return [node.op_type for node in self.nodes]

    def run(self, path: Path, name: str = "y") -> Any:
        return afpq.load(path).session().run([name], {"x": self.data})[0]

    def assert_same(self) -> None:
        np.testing.assert_array_equal(self.run(self.chained), self.run(self.plain))


def relu(x: str, y: str) -> Any:
    return graphs.node("Relu", x, y)


def test_convolutions_in_a_row_pass_bytes(tmp_path: Path) -> None:
    clip = graphs.node("Clip", "b zero six", "b6")
    bounds = {"zero": np.float32(0), "six": np.float32(1.25)}
    nodes, constants = network(
        conv("x", "a"),
        relu("a", "a0"),
        conv("a0", "b"),
        (clip, bounds),
        conv("b6", "y", strides=[2, 2]),
    )
    built = Built(tmp_path, nodes, constants)

    assert built.ops() == ["ConvU8", "ConvU8", "Conv"]
    built.assert_same()


def test_max_pools_and_concats_pass_them_on(tmp_path: Path) -> None:
    pool = graphs.node("MaxPool", "a0", "p", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)
    concat = graphs.node("Concat", "c0 d0", "e", axis=1)
    nodes, constants = network(
        conv("x", "a"), relu("a", "a0"), pool, conv("p", "c"), relu("c", "c0"),
        conv("p", "d"), relu("d", "d0"), concat, conv("e", "y", 2 * CHANNELS),
    )  # fmt: skip
    built = Built(tmp_path, nodes, constants)

    assert built.ops() == ["ConvU8", "MaxPoolU8", "ConvU8", "ConvU8", "Concat", "Conv"]
    assert {a.name: a.i for a in built.nodes[4].attribute} == {"axis": -1}
    built.assert_same()


@pytest.mark.parametrize("swapped", [False, True])
def test_residuals_become_part_of_the_later_convolution(tmp_path: Path, swapped: bool) -> None:
    order = "d b0" if swapped else "b0 d"
    nodes, constants = network(
        conv("x", "b"), relu("b", "b0"), conv("b0", "c"), relu("c", "c0"), conv("c0", "d"),
        graphs.node("Add", order, "s"), relu("s", "s0"), conv("s0", "y"),
    )  # fmt: skip
    built = Built(tmp_path, nodes, constants)

    assert built.ops() == ["ConvU8", "ConvU8", "ConvU8", "Conv"]
    last = built.nodes[2]
    assert list(last.input)[4] == "b0" and list(last.output) == ["s0"]
    assert compare(built.plain, built.chained, {"x": built.data}).outputs[0].sqnr_db > 30


def test_two_convolutions_that_meet_share_a_residual(tmp_path: Path) -> None:
    """The shortcut of a block with a stride, which only an Add reads, gets a format of its own."""
    nodes, constants = network(
        conv("x", "b"), relu("b", "b0"), conv("b0", "c", strides=[2, 2]),
        conv("b0", "d", strides=[2, 2]), relu("d", "d0"), conv("d0", "e"),
        graphs.node("Add", "e c", "s"), relu("s", "s0"), conv("s0", "y"),
    )  # fmt: skip
    built = Built(tmp_path, nodes, constants)

    assert built.ops() == ["ConvU8"] * 4 + ["Conv"]
    assert list(built.nodes[3].input)[4] == "c"
    assert compare(built.plain, built.chained, {"x": built.data}).outputs[0].sqnr_db > 30


def test_depthwise_convolutions_read_and_write_bytes(tmp_path: Path) -> None:
    nodes, constants = network(
        conv("x", "a"),
        relu("a", "a0"),
        conv("a0", "b", group=CHANNELS),
        relu("b", "b0"),
        conv("b0", "y"),
    )
    built = Built(tmp_path, nodes, constants)

    assert built.ops() == ["ConvU8", "ConvU8", "Conv"]
    built.assert_same()
    assert {layer.kernel for layer in afpq.packed.read_packed(built.chained).layers} <= {
        "byte",
        "pair",
    }


def test_what_others_read_stays_float(tmp_path: Path) -> None:
    """A float operator, the network's own output, an Add of two tensors that no convolution made alone."""
    nodes, constants = network(
        conv("x", "a"), relu("a", "a0"), graphs.node("Sigmoid", "a0", "g"), conv("a0", "b"), relu("b", "b0"),
        conv("b0", "c"), relu("c", "c0"), graphs.node("Add", "c0 g", "s"), conv("s", "y"),
    )  # fmt: skip
    built = Built(tmp_path, nodes, constants, outputs=("y", "c0"))

    assert built.ops() == ["Conv", "Sigmoid", "ConvU8", "Conv", "Add", "Conv"]
    built.assert_same()


def test_a_broadcast_is_no_residual(tmp_path: Path) -> None:
    pool = graphs.node("GlobalMaxPool", "b0", "p")
    nodes, constants = network(
        conv("x", "b"), relu("b", "b0"), pool, conv("p", "c"), conv("b0", "d"),
        graphs.node("Add", "d c", "s"), conv("s", "y"),
    )  # fmt: skip
    built = Built(tmp_path, nodes, constants)

    assert "Add" in built.ops()
    built.assert_same()


def plain_and_chained(folder: Path, nodes: Any, constants: Any, **options: Any) -> list[Any]:
    """The operators of a network without calibration data, whose results equal those without chaining."""
    shape = ["N", CHANNELS, 12, 10]
    source = graphs.write(folder, graphs.build(nodes, {"x": shape}, constants))
    x = np.random.default_rng(0).standard_normal((3, *shape[1:])).astype(np.float32)
    found = []
    for chain in (True, False):
        path = folder / f"chain_{chain}.onnx"
        afpq.quantize(source, chain=chain, **options).save(path)
        found.append(afpq.load(path).session(threads=1).run(None, {"x": x})[0])
    np.testing.assert_array_equal(*found)
    assert all(finding.passed for finding in verify(folder / "chain_True.onnx"))
    return list(onnx.load(folder / "chain_True.onnx").graph.node)


@pytest.mark.parametrize("activations", ["a16", "a8", "f32"])
@pytest.mark.parametrize("group", [1, CHANNELS])
def test_residuals_of_floats_change_no_bit(tmp_path: Path, activations: str, group: int) -> None:
    clip = graphs.node("Clip", "t zero six", "t0")
    bounds = {"zero": np.float32(-0.5), "six": np.float32(1.25)}
    nodes, constants = network(
        conv("x", "b"), graphs.node("Sigmoid", "b", "b0"), conv("b0", "c", group=group),
        graphs.node("Add", "b0 c", "s"), relu("s", "s0"), conv("s0", "d"), conv("s0", "e"),
        graphs.node("Add", "d e", "t"), (clip, bounds), conv("t0", "f"), graphs.node("Add", "f t0", "y"),
    )  # fmt: skip
    found = plain_and_chained(tmp_path, nodes, constants, activations=activations)

    assert [n.op_type for n in found] == ["Conv", "Sigmoid", "Conv", "Conv", "Conv", "Conv"]
    fields = [{a.name: a.f for a in n.attribute if a.name.startswith("clip")} for n in found]
    assert [list(n.input)[3:] for n in found[2:]] == [["", "b0"], [], ["", "d"], ["", "t0"]]
    assert fields[2:] == [{"clip_min": 0.0}, {}, {"clip_min": -0.5, "clip_max": 1.25}, {}]
    exported = tmp_path / "float.onnx"
    export(tmp_path / "chain_True.onnx", to="float").save(exported)
    assert [n.op_type for n in onnx.load(exported).graph.node].count("Add") == 3


@pytest.mark.parametrize("activations", ["a16", "a8", "f32"])
def test_products_add_residuals_too(tmp_path: Path, activations: str) -> None:
    """As in a transformer: a bias, a residual; what is broadcast or of an unknown extent stays an Add."""
    size = 32
    nodes = [
        graphs.node("Relu", "x", "x0"), graphs.node("MatMul", "x0 w", "a"), graphs.node("Add", "a b", "a0"),
        graphs.node("Add", "x0 a0", "s"), graphs.node("MatMul", "s v", "c"), graphs.node("Add", "c s", "t"),
        graphs.node("Relu", "t", "t0"), graphs.node("MatMul", "t0 w", "d"), graphs.node("Add", "d z", "y"),
    ]  # fmt: skip
    constants = {
        "w": graphs.constant(size, size, seed=1) / np.float32(size),
        "v": graphs.constant(size, size, seed=2) / np.float32(size),
        "b": graphs.constant(size, seed=3),
    }
    inputs = {"x": ["N", "T", size], "z": ["M", "T", size]}
    source = graphs.write(tmp_path, graphs.build(nodes, inputs, constants))
    rng = np.random.default_rng(0)
    feeds = {n: rng.standard_normal((2, 5, size)).astype(np.float32) for n in inputs}
    found = []
    for chain in (True, False):
        path = tmp_path / f"chain_{chain}.onnx"
        afpq.quantize(source, chain=chain, activations=activations).save(path)
        found.append(afpq.load(path).session(threads=1).run(None, feeds)[0])
    np.testing.assert_array_equal(*found)
    assert all(finding.passed for finding in verify(tmp_path / "chain_True.onnx"))

    packed = onnx.load(tmp_path / "chain_True.onnx").graph.node
    assert [n.op_type for n in packed] == ["Relu", "MatMul", "MatMul", "MatMul", "Add"]
    assert [list(n.input)[4:] for n in packed[1:4]] == [["x0"], ["s"], []]
    fields = [{a.name: a.f for a in n.attribute if a.name.startswith("clip")} for n in packed[1:4]]
    assert fields == [{}, {"clip_min": 0.0}, {}]
    exported = tmp_path / "float.onnx"
    export(tmp_path / "chain_True.onnx", to="float").save(exported)
    assert [n.op_type for n in onnx.load(exported).graph.node].count("Add") == 4


def test_what_is_no_residual_stays_an_add(tmp_path: Path) -> None:
    """Behind a clip, broadcast, of a tensor that others read too, of one that is the network's output."""
    pool = graphs.node("GlobalMaxPool", "b", "p")
    nodes, constants = network(
        conv("x", "a"), relu("a", "a0"), graphs.node("Add", "a0 x", "b"), pool, conv("b", "c"),
        graphs.node("Add", "c p", "d"), conv("d", "e"), graphs.node("Add", "e d", "f"), graphs.node("Mul", "e f", "y"),
    )  # fmt: skip
    found = [n.op_type for n in plain_and_chained(tmp_path, nodes, constants)]

    assert found == ["Conv", "Add", "GlobalMaxPool", "Conv", "Add", "Conv", "Add", "Mul"]


def test_without_calibration_data_nothing_is_passed(tmp_path: Path) -> None:
    nodes, constants = network(conv("x", "a"), relu("a", "a0"), conv("a0", "y"))
    model = graphs.build(nodes, {"x": ["N", CHANNELS, 12, 10]}, constants)
    afpq.quantize(graphs.write(tmp_path, model), activations="a8").save(tmp_path / "q.onnx")

    assert [n.op_type for n in onnx.load(tmp_path / "q.onnx").graph.node] == ["Conv", "Conv"]


def residual_network() -> tuple[list[Any], dict[str, Any]]:
    pool = graphs.node("MaxPool", "b0", "p", kernel_shape=[2, 2], strides=[2, 2])
    return network(
        conv("x", "b"), relu("b", "b0"), pool, conv("p", "c"), relu("c", "c0"), conv("c0", "d"),
        graphs.node("Add", "d p", "s"), relu("s", "s0"), graphs.node("Concat", "s0 t0", "u", axis=1),
        conv("u", "y", 2 * CHANNELS),
    )  # fmt: skip


def test_tools_understand_chained_files(tmp_path: Path) -> None:
    nodes, constants = residual_network()
    more, weights = conv("c0", "t")
    nodes[8:8] = [more, relu("t", "t0")]
    built = Built(tmp_path, nodes, constants | weights)
    assert built.ops().count("ConvU8") == 4 and "MaxPoolU8" in built.ops()

    assert all(finding.passed for finding in verify(built.chained))
    by_layer = compare(built.source, built.chained, {"x": built.data}, layers=True).layers
    assert len(by_layer) == 5 and min(layer.sqnr_db for layer in by_layer) > 10
    exported = tmp_path / "float.onnx"
    export(built.chained, to="float").save(exported)
    assert {n.op_type for n in onnx.load(exported).graph.node} == {
        "Conv",
        "Relu",
        "Add",
        "MaxPool",
        "Concat",
    }
    assert compare(built.source, exported, {"x": built.data}).outputs[0].sqnr_db > 15


def test_a_plan_can_name_tensors_that_are_only_added(tmp_path: Path) -> None:
    nodes, constants = network(
        conv("x", "b"), relu("b", "b0"), conv("b0", "c"), conv("b0", "d"),
        graphs.node("Add", "d c", "s"), conv("s", "y"),
    )  # fmt: skip
    built = Built(tmp_path, nodes, constants)
    plan = built.model.plan
    assert plan.activations is not None
    assert {entry.tensor for entry in plan.activations} == {"x", "b0", "c", "s"}
    again = afpq.quantize(built.source, plan, data={"x": built.data}, activations="a8")
    again.save(tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == built.chained.read_bytes()
