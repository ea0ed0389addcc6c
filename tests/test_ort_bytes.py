"""Convolutions in onnxruntime that pass bytes: against the same ones between floats, and every error they report."""

from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from kernel_arrays import clamp, fma
from kernel_rounding import encoded
from onnx import TensorProto, helper, numpy_helper
from test_ort import LIBRARY, weight_tensors

from afpq.formats import AfpFormat, codebook, encode, fake_quantize, round_scale

X_FORMAT, Y_FORMAT, R_FORMAT = AfpFormat.parse("ue1m7"), AfpFormat.parse("e0m7"), AfpFormat(2, 4)
X_SCALE, Y_SCALE, R_SCALE = 0.015625, 0.046875, 0.0390625

# (channels in, channels out, groups), spatial extents, attributes
CONVS: list[Any] = [
    ((16, 32, 1), (9, 7), dict(kernel_shape=[1, 1])),
    ((8, 20, 1), (9, 8), dict(kernel_shape=[1, 1], strides=[2, 2])),
    ((8, 16, 1), (9, 8), dict(kernel_shape=[3, 3], pads=[1, 1, 1, 1])),
    ((20, 70, 1), (6, 11), dict(kernel_shape=[3, 2], strides=[1, 2], pads=[0, 1, 2, 0])),
    ((30, 16, 1), (9, 8), dict(kernel_shape=[3, 3], pads=[1, 1, 1, 1])),  # patches
    ((8, 32, 2), (9, 8), dict(kernel_shape=[3, 3], dilations=[2, 1])),
    ((16, 16, 16), (9, 8), dict(kernel_shape=[3, 3], pads=[1, 1, 1, 1])),  # depthwise
    ((40, 40, 40), (9, 8), dict(kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 2])),
    ((96, 96, 96), (5, 13), dict(kernel_shape=[5, 4], pads=[2, 1, 2, 2])),
    ((16, 16, 16), (7, 9), dict(kernel_shape=[3, 3], pads=[2, 1, 2, 3], dilations=[2, 3])),
    ((16, 16, 16), (2, 2), dict(kernel_shape=[5, 5], pads=[2, 2, 2, 2])),  # no tap always inside
    ((17, 17, 17), (3, 60), dict(kernel_shape=[3, 3], pads=[1, 1, 1, 1])),
    ((7, 7, 7), (5, 6), dict(kernel_shape=[1, 1])),
    ((16, 16, 16), (31,), dict(kernel_shape=[9], auto_pad="SAME_UPPER")),
    ((8, 16, 1), (5, 4, 6), dict(kernel_shape=[2, 3, 2], pads=[1, 1, 0, 0, 1, 1])),
    ((4, 4, 4), (5, 4, 6), dict(kernel_shape=[2, 3, 2], pads=[1, 1, 0, 0, 1, 1])),
]
IDS = [f"{c}-{a}" for c, _, a in CONVS]
FORMATS = ["e2m1", "e0m7", "e3m2"]


def static(name: str, fmt: AfpFormat, scale: float) -> dict[str, Any]:
    return {f"{name}_format": str(fmt), f"{name}_scale": scale}


def bytes_of(x: Any, fmt: AfpFormat, scale: float) -> Any:
    """Channels last, as convolutions pass it."""
    integers = codebook(fmt)[encode(x, fmt, np.float32(scale))] + fmt.zero_byte
    return np.ascontiguousarray(np.moveaxis(integers.astype(np.uint8), 1, -1))


def run(
    op: str, tensors: list[Any], feeds: dict[str, Any], bias: bool, threads: int = 2, **fields: Any
) -> Any:
    """One operator; `feeds` has x and perhaps a residual r."""
    names = ["x", "w", "s", "b" if bias else "", *(["r"] if "r" in feeds else [])]
    node = helper.make_node(op, names, ["y"], name="the_node", domain="afpq", **fields)
    made = TensorProto.FLOAT if op == "Conv" else TensorProto.UINT8
    inputs = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
        for n, a in feeds.items()
    ]
    rank = feeds["x"].ndim
    graph = helper.make_graph(
        [node], "g", inputs, [helper.make_tensor_value_info("y", made, [None] * rank)], tensors
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("afpq", 1)]
    content = helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(LIBRARY)
    return ort.InferenceSession(content, options).run(None, feeds)[0]


class Case:
    """A convolution, its input on the grid of its format, and what it gives between floats."""

    def __init__(self, conv: Any, text: str) -> None:
        (cin, cout, groups), spatial, attributes = conv
        rng = np.random.default_rng(3)
        k = int(np.prod(attributes["kernel_shape"])) * cin // groups
        weight = rng.standard_normal((cout, k)).astype(np.float32)
        _, self.tensors = weight_tensors(weight, AfpFormat.parse(text))
        self.bias = rng.standard_normal(cout).astype(np.float32)
        self.tensors.append(numpy_helper.from_array(self.bias, "b"))
        self.fields = dict(format=text, n=cout, k=k, group=groups, activations="a8", **attributes)
        self.fields |= static("activation", X_FORMAT, X_SCALE)
        x = rng.standard_normal((2, cin, *spatial)).astype(np.float32)
        self.x = fake_quantize(np.abs(x), X_FORMAT, np.float32(X_SCALE))
        self.floats = self.run("Conv", {"x": self.x})
        r = rng.standard_normal(self.floats.shape).astype(np.float32)
        self.residual = fake_quantize(r, R_FORMAT, np.float32(R_SCALE))

    def run(self, op: str, feeds: dict[str, Any], **fields: Any) -> Any:
        return run(op, self.tensors, feeds, True, **{**self.fields, **fields})

    def bytes(self, residual: Any = None, low: float = -np.inf, high: float = np.inf) -> Any:
        """What ConvU8 gives: it counts in steps of its format, to the last bit (docs/specification.md)."""
        # Without a bias floats are the products times the scale of x, a power of two.
        products = run("Conv", self.tensors[:2], {"x": self.x}, False, **self.fields) / X_SCALE
        step = np.float32(Y_SCALE)
        bias = self.bias.reshape(-1, *[1] * (products.ndim - 2))
        steps = fma(products, np.float32(X_SCALE) / step, bias / step)
        if residual is not None:
            integers = np.rint(residual / np.float32(R_SCALE))
            steps = fma(integers, np.float32(R_SCALE) / step, steps)
        steps = clamp(steps, np.float32(low) / step, np.float32(high) / step)
        return np.moveaxis(encoded(steps, Y_FORMAT, np.float32(1)), 1, -1)


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("conv", CONVS, ids=IDS)
def test_bytes_are_the_rounded_floats(conv: Any, text: str) -> None:
    case = Case(conv, text)
    expected = case.bytes()
    output = static("output", Y_FORMAT, Y_SCALE)

    from_floats = case.run("ConvU8", {"x": case.x}, **output)
    from_bytes = case.run("ConvU8", {"x": bytes_of(case.x, X_FORMAT, X_SCALE)}, **output)
    to_floats = case.run("Conv", {"x": bytes_of(case.x, X_FORMAT, X_SCALE)})
    alone = case.run("ConvU8", {"x": case.x}, threads=1, **output)

    np.testing.assert_array_equal(from_floats, expected)
    np.testing.assert_array_equal(from_bytes, expected)
    np.testing.assert_array_equal(alone, expected)
    np.testing.assert_array_equal(to_floats, case.floats)


@pytest.mark.parametrize("bounds", [(-np.inf, np.inf), (0.0, 1.5)], ids=["open", "clipped"])
@pytest.mark.parametrize("conv", CONVS, ids=IDS)
def test_residuals_are_added_before_the_clip(conv: Any, bounds: tuple[float, float]) -> None:
    case = Case(conv, "e2m2")
    low, high = bounds
    fields = static("residual", R_FORMAT, R_SCALE)
    if high < np.inf:
        fields |= {"clip_min": low, "clip_max": high}
    feeds = {
        "x": bytes_of(case.x, X_FORMAT, X_SCALE),
        "r": bytes_of(case.residual, R_FORMAT, R_SCALE),
    }
    expected = np.clip(case.floats + case.residual, np.float32(low), np.float32(high))

    floats = case.run("Conv", feeds, **fields)
    stored = case.run("ConvU8", feeds, **fields, **static("output", Y_FORMAT, Y_SCALE))

    np.testing.assert_array_equal(floats, expected)
    np.testing.assert_array_equal(stored, case.bytes(case.residual, low, high))


@pytest.mark.parametrize("bounds", [(-np.inf, np.inf), (-0.3, 1.5)], ids=["open", "clipped"])
@pytest.mark.parametrize("output", ["e0m7", "e2m4"])
@pytest.mark.parametrize("text", ["e2m2", "e2m5"])
def test_layers_count_in_steps_of_their_bytes(
    text: str, output: str, bounds: tuple[float, float]
) -> None:
    """To the last bit, with scales that are no powers of two: docs/specification.md."""
    rng = np.random.default_rng(6)
    fmt, out = AfpFormat.parse(text), AfpFormat.parse(output)
    x_scale, y_scale, r_scale = (np.float32(f * 2.0**-9) for f in (9, 23, 21))
    weight = rng.standard_normal((70, 24)).astype(np.float32)
    values, tensors = weight_tensors(weight, fmt)
    scale = round_scale(fmt, np.abs(weight).max(1) / fmt.max_integer, "real")
    bias = rng.standard_normal(70).astype(np.float32)
    tensors.append(numpy_helper.from_array(bias, "b"))
    x = rng.integers(0, 256, (2, 9, 7, 24), np.uint8)
    r = rng.integers(1, 256, (2, 9, 7, 70), np.uint8)
    low, high = (np.float32(bound) for bound in bounds)

    sums = np.rint(x.astype(np.float64) @ (values / scale[:, None]).astype(np.float64).T)
    steps = fma(sums.astype(np.float32) * scale, x_scale / y_scale, bias / y_scale)
    steps = fma(r.astype(np.float32) - np.float32(128), r_scale / y_scale, steps)
    expected = encoded(clamp(steps, low / y_scale, high / y_scale), out, np.float32(1))

    fields = static("activation", X_FORMAT, float(x_scale)) | static("output", out, float(y_scale))
    fields |= static("residual", AfpFormat.parse("e0m7"), float(r_scale))
    if high < np.inf:
        fields |= {"clip_min": float(low), "clip_max": float(high)}
    fields |= dict(format=text, n=70, k=24, kernel_shape=[1, 1], activations="a8")
    np.testing.assert_array_equal(
        run("ConvU8", tensors, {"x": x, "r": r}, True, **fields), expected
    )


@pytest.mark.parametrize("width", [5, 8])
@pytest.mark.parametrize("text", ["e2m2", "e4m1"])
def test_float_paths_write_bytes_too(text: str, width: int) -> None:
    """The first layer of an image network, and weights that are multiplied as floats."""
    rng = np.random.default_rng(4)
    fmt, step, planar = AfpFormat.parse(text), np.float32(Y_SCALE), (text, width) == ("e2m2", 8)
    channels = 3 if text == "e2m2" else 8
    weight = rng.standard_normal((20, channels)).astype(np.float32)
    values, tensors = weight_tensors(weight, fmt)
    scale = round_scale(fmt, np.abs(weight).max(1) / fmt.max_integer, "real")
    x = rng.standard_normal((2, channels, 9, width)).astype(np.float32)

    sums = np.zeros((2, 20, 9, width), np.float32)
    for c, integers in enumerate(np.rint(values / scale[:, None]).T.astype(np.float32)):
        sums = fma(x[:, c : c + 1], integers[:, None, None], sums)
    of_channel = scale[:, None, None]
    if planar:  # the scale has its place in the last step
        steps = fma(sums, of_channel / step, np.float32(0))
    else:
        steps = fma(sums * of_channel, np.float32(1) / step, np.float32(0))
    steps = clamp(steps, -np.inf, np.float32(1) / step)
    expected = np.moveaxis(encoded(steps, Y_FORMAT, np.float32(1)), 1, -1)

    fields = dict(format=text, n=20, k=channels, kernel_shape=[1, 1], activations="a8")
    fields |= dict(clip_max=1.0) | static("output", Y_FORMAT, Y_SCALE)
    np.testing.assert_array_equal(run("ConvU8", tensors, {"x": x}, False, **fields), expected)


# (channels in and out), spatial extents, attributes; rows of outputs are long enough for float planes
FEW_CHANNELS: list[Any] = [
    ((3, 20), (13, 17), dict(kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])),
    ((3, 32), (21, 120), dict(kernel_shape=[3, 3], strides=[2, 2], pads=[0, 0, 1, 1])),
    ((1, 70), (30, 33), dict(kernel_shape=[5, 4], pads=[4, 1, 2, 3])),
    ((2, 130), (20, 9), dict(kernel_shape=[3, 3], dilations=[2, 1], pads=[2, 1, 2, 1])),
    ((1, 16), (9, 12), dict(kernel_shape=[1, 1])),
    ((3, 5), (8, 40), dict(kernel_shape=[3, 4], strides=[1, 3], auto_pad="SAME_LOWER")),
    ((2, 17), (64,), dict(kernel_shape=[9], strides=[3], pads=[8, 4])),
    ((1, 16), (6, 5, 12), dict(kernel_shape=[2, 3, 4], strides=[2, 1, 1], pads=[1, 1, 2, 0, 1, 1])),
    ((3, 24), (3, 10), dict(kernel_shape=[4, 4], pads=[3, 3, 3, 3])),
]


@pytest.mark.parametrize("case", FEW_CHANNELS, ids=str)
def test_first_layers_write_the_bytes_of_their_floats(case: Any) -> None:
    """Small whole numbers add up exactly, so that only the end of the layer rounds."""
    (channels, n), spatial, attributes = case
    rng = np.random.default_rng(6)
    fmt, taps = AfpFormat.parse("e2m2"), int(np.prod(attributes["kernel_shape"]))
    x = rng.integers(-8, 9, (2, channels, *spatial)).astype(np.float32)
    weight = rng.standard_normal((n, taps * channels)).astype(np.float32)
    scale = round_scale(fmt, np.abs(weight).max(1) / fmt.max_integer, "real")
    _, tensors = weight_tensors(weight, fmt)
    bias = rng.standard_normal(n).astype(np.float32)
    fields = dict(format="e2m2", n=n, k=taps * channels, activations="a8", **attributes)
    floats = run("Conv", tensors, {"x": x}, False, **fields)
    column = (slice(None), *(None,) * len(spatial))
    sums = np.rint(floats / scale[column])
    np.testing.assert_array_equal(sums.astype(np.float32) * scale[column], floats)

    step, (low, high) = np.float32(Y_SCALE), (-2.0, 1.5)
    steps = fma(sums.astype(np.float32), (scale / step)[column], (bias / step)[column])
    steps = clamp(steps, np.float32(low) / step, np.float32(high) / step)
    expected = np.moveaxis(encoded(steps, Y_FORMAT, np.float32(1)), 1, -1)
    fields |= dict(clip_min=low, clip_max=high) | static("output", Y_FORMAT, Y_SCALE)
    tensors.append(numpy_helper.from_array(bias, "b"))
    for threads in (1, 2):
        found = run("ConvU8", tensors, {"x": x}, True, threads, **fields)
        np.testing.assert_array_equal(found, expected)


def test_no_number_becomes_the_least() -> None:
    case = Case(CONVS[0], "e2m2")
    x = case.x.copy()
    x[0, 0, 0, 0] = np.nan
    stored = case.run("ConvU8", {"x": x}, **static("output", Y_FORMAT, Y_SCALE))
    assert (stored[0] == 1).all()  # -127 + 128: the sample has no scale
    np.testing.assert_array_equal(stored[1], case.bytes()[1])


POOLS: list[Any] = [
    ((9, 8), dict(kernel_shape=[2, 2], strides=[2, 2])),
    ((9, 8), dict(kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)),
    ((13, 13), dict(kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)),
    ((9, 8), dict(kernel_shape=[3, 3], strides=[1, 2], pads=[1, 1, 1, 1])),
    ((9, 9), dict(kernel_shape=[2, 3], dilations=[2, 3], pads=[0, 1, 1, 0])),
    ((10, 7), dict(kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER")),
    ((31,), dict(kernel_shape=[4], strides=[3])),
    ((5, 4, 6), dict(kernel_shape=[2, 2, 3], strides=[1, 2, 2])),
]


def pool(domain: str, op: str, data: Any, **attributes: Any) -> Any:
    node = helper.make_node(op, ["x"], ["y"], name="the_node", domain=domain, **attributes)
    kind = helper.np_dtype_to_tensor_dtype(data.dtype)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", kind, data.shape)],
        [helper.make_tensor_value_info("y", kind, [None] * data.ndim)],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("afpq", 1)]
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(LIBRARY)
    content = helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
    return ort.InferenceSession(content, options).run(None, {"x": data})[0]


@pytest.mark.parametrize(("spatial", "attributes"), POOLS, ids=str)
def test_max_pool_equals_the_float_op(spatial: Any, attributes: dict[str, Any]) -> None:
    x = np.random.default_rng(5).integers(0, 256, (2, 37, *spatial), np.uint8)
    last = np.ascontiguousarray(np.moveaxis(x, 1, -1))
    expected = np.moveaxis(pool("", "MaxPool", x.astype(np.float32), **attributes), 1, -1)
    np.testing.assert_array_equal(pool("afpq", "MaxPoolU8", last, **attributes), expected)


@pytest.mark.parametrize("pads", [[2, 0, 0, 0], [0, 0, 0, 5]])
def test_windows_of_nothing_but_padding_are_refused(pads: list[int]) -> None:
    x = np.zeros((1, 6, 6, 16), np.uint8)
    with pytest.raises(Exception, match=r"the_node.*a pad that is not smaller than the kernel, 2"):
        pool("afpq", "MaxPoolU8", x, kernel_shape=[2, 2], pads=pads)


@pytest.mark.parametrize(
    ("op", "change", "feeds", "message"),
    [
        ("ConvU8", {}, {}, "attribute output_format is missing"),
        ("ConvU8", static("output", AfpFormat(4, 1), 0.5), {}, "not a format with a mantissa whose"),
        ("ConvU8", {"output_format": "e0m7", "output_scale": 0.3}, {}, "output_scale is 0.3, not a positive number"),
        ("Conv", {}, {"r": np.zeros((2, 9, 7, 32), np.uint8)}, "attribute residual_format is missing"),
        (
            "Conv",
            static("residual", R_FORMAT, R_SCALE),
            {"r": np.zeros((2, 9, 7, 31), np.uint8)},
            "residual has shape [2, 9, 7, 31], needs [2, 9, 7, 32]",
        ),
        (
            "Conv",
            {},
            {"r": np.zeros((2, 9, 7, 32), np.float32)},
            "residual has shape [2, 9, 7, 32], needs [2, 32, 9, 7]",
        ),
        ("Conv", {}, {"r": np.zeros((2, 32, 9, 7), np.int32)}, "residual must be float32 or uint8"),
        (
            "ConvU8",
            static("output", Y_FORMAT, Y_SCALE),
            {"r": np.zeros((2, 32, 9, 7), np.float32)},
            "residual must be uint8 where the output is",
        ),
        ("Conv", {}, {"x": np.zeros((2, 16, 9, 7), np.uint8)}, "with 16 channels on axis 3"),
        ("Conv", {"activation_format": "", "activation_scale": 0.0}, {}, "_format is missing, which bytes need"),
        ("Conv", {"format": "e4m1"}, {}, "runs on floats: bytes cannot be its input"),
        ("Conv", {}, {"x": np.zeros((2, 16, 9, 7), np.int32)}, "input X must be float32 or uint8"),
    ],
)  # fmt: skip
def test_errors_name_what_is_wrong(
    op: str, change: dict[str, Any], feeds: dict[str, Any], message: str
) -> None:
    case = Case(CONVS[0], str(change.get("format", "e2m2")))
    feeds = {"x": bytes_of(case.x, X_FORMAT, X_SCALE), **feeds}
    with pytest.raises(Exception, match="the_node") as error:
        case.run(op, feeds, **change)
    assert message in str(error.value)
