"""The custom-op library in onnxruntime: every op against the runtime's own float op, and every error it reports."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import afpq
from afpq.formats import AfpFormat, decode, encode, fake_quantize, round_scale
from afpq.packing import pack

LIBRARY = str(Path(afpq._core.__file__).parent / "libafpq_ort.so")


def weight_tensors(weight, fmt, kind="real"):
    """Two initializers `w` and `s` and the values that they hold."""
    scale = round_scale(fmt, np.abs(weight).max(1) / fmt.max_integer, kind)
    codes = encode(weight, fmt, scale[:, None])
    if kind == "real":
        raw = (scale.view(np.uint32) >> 16).astype("<u2").tobytes()
        stored = TensorProto(
            name="s", data_type=TensorProto.BFLOAT16, dims=scale.shape, raw_data=raw
        )
    else:
        bias = 1 - fmt.mantissa_bits - np.log2(scale)
        stored = numpy_helper.from_array(bias.astype(np.int8), "s")
    packed = numpy_helper.from_array(pack(codes, fmt.bits), "w")
    return decode(codes, fmt, scale[:, None]), [packed, stored]


def model(op, initializers, inputs, rank, domain="afpq", element=TensorProto.FLOAT, **attributes):
    names = [*inputs, *[t.name for t in initializers]]
    order = names if op != "Gather" else [*[t.name for t in initializers], *inputs]
    node = helper.make_node(op, order, ["y"], name="the_node", domain=domain, **attributes)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info(n, element, shape) for n, shape in inputs.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * rank)],
        initializers,
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("afpq", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()


def session(serialized, threads=2):
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(LIBRARY)
    return ort.InferenceSession(serialized, options, providers=["CPUExecutionProvider"])


def run(serialized, threads=2, **feeds):
    return session(serialized, threads).run(None, feeds)[0]


@pytest.mark.parametrize("kind", ["real", "integer"])
@pytest.mark.parametrize("text", ["e2m1", "e2m2", "e3m2", "e4m1"])
def test_matmul_equals_the_float_op_with_decoded_weights(text, kind):
    rng = np.random.default_rng(0)
    fmt = AfpFormat.parse(text)
    values, tensors = weight_tensors(rng.standard_normal((37, 50)).astype(np.float32), fmt, kind)
    bias = rng.standard_normal(37).astype(np.float32)
    x = rng.standard_normal((2, 53, 50)).astype(np.float32)
    serialized = model(
        "MatMul", [*tensors, numpy_helper.from_array(bias, "b")], {"x": [None, None, 50]}, 3,
        format=text, n=37, k=50, clip_min=0.0,
    )  # fmt: skip
    expected = np.maximum(x @ values.T + bias, 0)
    np.testing.assert_allclose(run(serialized, x=x), expected, atol=2e-3)
    np.testing.assert_array_equal(run(serialized, x=x), run(serialized, threads=1, x=x))


def test_weights_of_megabytes_are_read_as_they_are():
    # They are moved to pages of 2 MB when they are loaded: 4.8 MB hold one at least, wherever they begin.
    fmt, rng = AfpFormat(2, 2), np.random.default_rng(1)
    values, tensors = weight_tensors(rng.standard_normal((3000, 2560)).astype(np.float32), fmt)
    x = rng.standard_normal((1, 2560)).astype(np.float32)
    serialized = model("MatMul", tensors, {"x": [1, 2560]}, 2, format="e2m2", n=3000, k=2560)
    expected = x.astype(np.float64) @ values.astype(np.float64).T
    np.testing.assert_allclose(run(serialized, x=x), expected, atol=2e-2)


CONVS = [
    ((3, 20, 1), dict(kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])),
    ((8, 16, 1), dict(kernel_shape=[3, 3], auto_pad="SAME_UPPER", strides=[2, 1])),
    ((8, 16, 1), dict(kernel_shape=[4, 3], auto_pad="SAME_LOWER")),
    ((8, 16, 1), dict(kernel_shape=[3, 3], auto_pad="VALID", dilations=[2, 2])),
    ((16, 16, 16), dict(kernel_shape=[3, 3], pads=[0, 1, 2, 1], strides=[2, 2])),
    ((8, 32, 2), dict(kernel_shape=[1, 1])),
    ((6, 9, 3), dict(kernel_shape=[3, 2])),
]


@pytest.mark.parametrize("spatial", [1, 2, 3])
@pytest.mark.parametrize(("channels", "attributes"), CONVS, ids=str)
def test_conv_equals_the_float_op_with_decoded_weights(channels, attributes, spatial):
    rng = np.random.default_rng(1)
    cin, cout, group = channels
    full = {"strides": [1, 1], "dilations": [1, 1], **attributes}
    cut = {
        name: value if isinstance(value, str) else [*value[-1:] * (spatial - 2), *value[:spatial]]
        for name, value in full.items()
        if name != "pads"
    }
    if "pads" in full:
        cut["pads"] = [1] * (2 * spatial) if spatial != 2 else full["pads"]
    kernel = cut["kernel_shape"]
    k = int(np.prod(kernel)) * cin // group
    values, tensors = weight_tensors(
        rng.standard_normal((cout, k)).astype(np.float32), AfpFormat(2, 2)
    )
    x = rng.standard_normal((2, cin, *[9, 8, 7][:spatial])).astype(np.float32)
    bias = numpy_helper.from_array(rng.standard_normal(cout).astype(np.float32), "b")
    shape = {"x": [None, cin, *[None] * spatial]}
    y = run(
        model(
            "Conv",
            [*tensors, bias],
            shape,
            spatial + 2,
            format="e2m2",
            n=cout,
            k=k,
            group=group,
            **cut,
        ),
        x=x,
    )
    dense = np.moveaxis(values.reshape(cout, *kernel, cin // group), -1, 1)
    dense = numpy_helper.from_array(np.ascontiguousarray(dense), "w")
    expected = run(
        model("Conv", [dense, bias], shape, spatial + 2, domain="", group=group, **cut), x=x
    )
    assert y.shape == expected.shape
    np.testing.assert_allclose(y, expected, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_runs_at_the_same_time_do_not_disturb_each_other(threads, kernel):
    rng = np.random.default_rng(kernel)
    _, tensors = weight_tensors(
        rng.standard_normal((32, 16 * kernel**2)).astype(np.float32), AfpFormat(2, 2)
    )
    serialized = model(
        "Conv", tensors, {"x": ["N", 16, 32, 32]}, 4, format="e2m2", n=32, k=16 * kernel**2,
        kernel_shape=[kernel] * 2, pads=[kernel // 2] * 4,
    )  # fmt: skip
    # As many ranges as inputs: what one run makes of its input would be wrong for another.
    inputs = [rng.standard_normal((1, 16, 32, 32)).astype(np.float32) * 2**i for i in range(4)]
    shared = session(serialized, threads)
    expected = [shared.run(None, {"x": x})[0] for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(50):
            results = pool.map(lambda x: shared.run(None, {"x": x})[0], inputs)
            for result, alone in zip(results, expected, strict=True):
                np.testing.assert_array_equal(result, alone)


@pytest.mark.parametrize("element", [TensorProto.INT64, TensorProto.INT32])
def test_gather_decodes_the_rows_it_picks(element):
    values, tensors = weight_tensors(
        np.random.default_rng(2).standard_normal((40, 21)).astype(np.float32), AfpFormat(2, 3)
    )
    indices = np.array([[0, 39, -1], [-40, 7, 7], [-33, 7, 0]])
    dtype = helper.tensor_dtype_to_np_dtype(element)
    serialized = model(
        "Gather", tensors, {"x": [None, None]}, 3, element=element, format="e2m3", n=40, k=21
    )
    y = run(serialized, x=indices.astype(dtype))
    np.testing.assert_array_equal(y, values[indices])


def test_an_index_out_of_range_is_an_error_that_names_it():
    _, tensors = weight_tensors(np.eye(8, dtype=np.float32), AfpFormat(2, 1))
    serialized = model(
        "Gather", tensors, {"x": [None]}, 2, element=TensorProto.INT64, format="e2m1", n=8, k=8
    )
    with pytest.raises(Exception, match=r"the_node.*index 8 is not in the range -8\.\.7"):
        run(serialized, x=np.array([8]))


STATIC = dict(activations="a8", activation_format="ue2m5", activation_scale=0.5)
BAD = [
    (dict(format="e9m9"), "attribute format is 'e9m9'"),
    (dict(n=0), "attribute n is 0"),
    (dict(n=15), "scale has shape"),
    (dict(k=100), "weight must be uint8"),
    (dict(activations="a4"), "attribute activations is 'a4'"),
    (dict(group_size=3), "attribute group_size is 3"),
    (dict(activation_scale=0.5), "attribute activation_scale needs activation_format"),
    (STATIC | dict(activations="a16"), "attribute activation_format needs activations 'a8'"),
    (STATIC | dict(activation_format="ue9m9"), "attribute activation_format is 'ue9m9'"),
    (STATIC | dict(activation_format="e2m5"), "attribute activation_format is 'e2m5'"),
    (STATIC | dict(activation_format="ue3m0"), "attribute activation_format is 'ue3m0'"),
    (STATIC | dict(activation_scale=-1.0), "attribute activation_scale is -1,"),
    (STATIC | dict(activation_scale=0.1), r"attribute activation_scale is 0\.1,"),
    (dict(activations="a8", activation_format="e0m7"), "attribute activation_scale is 0,"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=str)
def test_a_bad_attribute_is_an_error_that_names_node_and_attribute(change, message):
    _, tensors = weight_tensors(np.eye(16, dtype=np.float32), AfpFormat(2, 1))
    attributes = {"format": "e2m1", "n": 16, "k": 16, **change}
    with pytest.raises(Exception, match=f"(?s)the_node.*{message}"):
        run(model("MatMul", tensors, {"x": [None, None]}, 2, **attributes))


@pytest.mark.parametrize(("text", "scale"), [("ue2m5", 0.0625), ("e2m4", 0.03125)])
@pytest.mark.parametrize("op", ["MatMul", "Conv"])
def test_a_static_activation_format_rounds_the_input_once(op, text, scale):
    rng = np.random.default_rng(4)
    values, tensors = weight_tensors(
        rng.standard_normal((16, 8)).astype(np.float32), AfpFormat(2, 2)
    )
    x = (3 * rng.standard_normal((5, 8))).astype(np.float32)
    shape, more = ([5, 8], {}) if op == "MatMul" else ([5, 8, 1], {"kernel_shape": [1]})
    static = {"activation_format": text, "activation_scale": scale}
    y = run(
        model(op, tensors, {"x": shape}, len(shape), format="e2m2", n=16, k=8, activations="a8",
              **more, **static),
        x=x.reshape(shape),
    )  # fmt: skip
    expected = fake_quantize(x, AfpFormat.parse(text), scale) @ values.T
    np.testing.assert_allclose(y.reshape(5, 16), expected, atol=1e-5)


def test_an_input_of_the_wrong_shape_is_an_error():
    _, tensors = weight_tensors(np.eye(16, dtype=np.float32), AfpFormat(2, 1))
    serialized = model("MatMul", tensors, {"x": [None, None]}, 2, format="e2m1", n=16, k=16)
    with pytest.raises(Exception, match=r"X has shape \[2, 15\], its last axis must be k = 16"):
        run(serialized, x=np.zeros((2, 15), np.float32))


def test_matmul_adds_a_residual_of_its_own_shape_only():
    values, tensors = weight_tensors(np.eye(16, dtype=np.float32), AfpFormat(2, 1))
    node = helper.make_node(
        "MatMul", ["x", "w", "s", "", "r"], ["y"], name="the_node", domain="afpq",
        format="e2m1", n=16, k=16, activations="f32", clip_min=0.0,
    )  # fmt: skip
    shape = [None, None, 16]
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "xr"],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        tensors,
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("afpq", 1)]
    added = session(
        helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
    )
    x, r = np.random.default_rng(0).standard_normal((2, 2, 3, 16)).astype(np.float32)

    expected = np.maximum(x @ values.T + r, np.float32(0))
    np.testing.assert_allclose(added.run(None, {"x": x, "r": r})[0], expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(
        Exception, match=r"the_node.*residual has shape \[1, 3, 16\], needs \[2, 3, 16\]"
    ):
        added.run(None, {"x": x, "r": r[:1]})


def test_an_empty_batch_gives_an_empty_result():
    _, tensors = weight_tensors(np.eye(16, dtype=np.float32), AfpFormat(2, 1))
    serialized = model("MatMul", tensors, {"x": [None, None]}, 2, format="e2m1", n=16, k=16)
    assert run(serialized, x=np.zeros((0, 16), np.float32)).shape == (0, 16)


def session_in_a_process(isa):
    _, tensors = weight_tensors(np.eye(16, dtype=np.float32), AfpFormat(2, 1))
    serialized = model("MatMul", tensors, {"x": [None, None]}, 2, format="e2m1", n=16, k=16)
    code = (
        "import sys, onnxruntime as o; s = o.SessionOptions(); s.log_severity_level = 4;"
        f"s.register_custom_ops_library({LIBRARY!r}); o.InferenceSession(sys.stdin.buffer.read(), s);"
        "print('afpq' in sys.modules)"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        input=serialized,
        capture_output=True,
        env={**os.environ, "AFPQ_ISA": isa},
    )


def test_plain_onnxruntime_runs_the_ops_without_afpq():
    done = session_in_a_process("scalar")
    assert (done.returncode, done.stdout.strip()) == (0, b"False"), done.stderr


def test_an_unknown_isa_is_an_error_that_lists_the_choices():
    done = session_in_a_process("mmx")
    assert done.returncode != 0
    assert b"'mmx'" in done.stderr and b"scalar" in done.stderr
