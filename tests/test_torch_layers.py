"""Packed layers as torch modules: each against the float layer with the decoded weight, and what they refuse."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import ml_dtypes  # noqa: E402
from torch import nn  # noqa: E402

from afpq import _torch_kernels  # noqa: E402
from afpq._layer import conv_matrix  # noqa: E402
from afpq._torch_layers import Attributes, Packed, kind_of, pack_layer  # noqa: E402
from afpq.errors import ModelError  # noqa: E402
from afpq.formats import AfpFormat, encode  # noqa: E402
from afpq.packing import pack, store_scale  # noqa: E402
from afpq.rounding import best_scale  # noqa: E402

E2M3 = AfpFormat(2, 3)


def packed_of(layer, fmt=E2M3, kind="real", group_size=0, owner=None, **attributes):
    """A layer's weight rounded to nearest."""
    weight = layer.weight.detach().numpy()
    matrix = conv_matrix(weight) if weight.ndim > 2 else weight
    n, k = matrix.shape
    if group_size:
        starts = range(0, k, group_size)
        groups = [np.ascontiguousarray(matrix[:, i : i + group_size]) for i in starts]
        scale = np.stack([best_scale(g, fmt, kind=kind)[0] for g in groups])
        spread = np.repeat(scale, group_size, axis=0)[:k].T
    else:
        scale = best_scale(matrix, fmt, kind=kind)[0]
        spread = scale[:, None]
    stored = store_scale(fmt, scale, kind)
    scales = torch.from_numpy(stored if kind == "integer" else stored.view(np.int16))
    bias = getattr(layer, "bias", None)
    return Packed(
        Attributes(str(fmt), n, k, group_size, **attributes),
        torch.from_numpy(pack(encode(matrix, fmt, spread), fmt.bits)),
        scales if kind == "integer" else scales.view(torch.bfloat16),
        None if bias is None else bias.detach().clone(),
        owner,
    )


def packed_layer(layer, **options):
    torch.manual_seed(1)
    return pack_layer(layer, packed_of(layer, **options))


def with_weight(layer, weight):
    result = copy.deepcopy(layer)
    result.weight.data = weight
    return result


LAYERS = {
    "linear": (lambda: nn.Linear(37, 21), (5, 3, 37)),
    "linear of one row": (lambda: nn.Linear(16, 9, bias=False), (16,)),
    "conv1d same": (lambda: nn.Conv1d(6, 20, 4, padding="same", dilation=2), (2, 6, 17)),
    "conv1d circular": (lambda: nn.Conv1d(8, 16, 5, padding=3, padding_mode="circular"), (2, 8, 9)),
    "conv2d groups": (lambda: nn.Conv2d(8, 32, (3, 2), 2, (1, 0), groups=2), (3, 8, 9, 7)),
    "conv2d depthwise": (lambda: nn.Conv2d(12, 12, 3, padding=2, groups=12), (2, 12, 5, 6)),
    "conv2d reflect": (lambda: nn.Conv2d(4, 5, 3, padding=(2, 1), padding_mode="reflect"), (1, 4, 6, 5)),
    "conv2d unbatched": (lambda: nn.Conv2d(4, 16, 3, bias=False), (4, 6, 5)),
    "conv3d valid": (lambda: nn.Conv3d(2, 8, (2, 3, 1), padding="valid"), (2, 2, 4, 5, 3)),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_the_float_layer_with_decoded_weights(name):
    make, shape = LAYERS[name]
    layer = make()
    x = torch.randn(shape)
    exact = packed_layer(layer, activations="f32")
    rounded = packed_layer(layer)
    expected = with_weight(layer, exact.weight)(x).detach()
    assert exact.weight.shape == layer.weight.shape
    torch.testing.assert_close(exact(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rounded(x), expected, rtol=1e-3, atol=1e-3)


def test_weights_decode_to_what_was_rounded():
    layer = nn.Conv2d(3, 16, 3)
    decoded = packed_layer(layer, fmt=AfpFormat(0, 7)).weight
    assert (decoded - layer.weight).abs().max() < 0.01 * layer.weight.abs().max()


@pytest.mark.parametrize("kind", ["real", "integer"])
@pytest.mark.parametrize("activations", ["a16", "a8", "f32"])
def test_scales_of_groups_of_k(kind, activations):
    layer = nn.Linear(70, 24)
    x = torch.randn(4, 70)
    packed = packed_layer(layer, group_size=32, kind=kind, activations=activations)
    expected = with_weight(layer, packed.weight)(x).detach()
    torch.testing.assert_close(packed(x), expected, rtol=0.02, atol=0.02)


def test_an_embedding_decodes_the_rows():
    table = nn.Embedding(40, 12)
    packed = packed_layer(table)
    indices = torch.tensor([[0, 39, 7], [7, 7, 1]])
    assert torch.equal(packed(indices), packed.weight[indices])
    assert torch.equal(packed(indices.int()), packed(indices))


def test_a_static_format_rounds_what_a_layer_reads():
    layer = nn.Linear(32, 16)
    packed = packed_layer(layer, activations="a8", activation_format="e0m7", activation_scale=0.25)
    x = torch.randn(3, 32)
    assert torch.equal(packed(x), packed((x / 0.25).round() * 0.25))


def test_half_inputs_give_half_outputs():
    packed = packed_layer(nn.Linear(32, 16))
    x = torch.randn(3, 32).half()
    assert torch.equal(packed(x), packed(x.float()).half())


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_do_not_change_the_result(threads, monkeypatch):
    monkeypatch.setattr(_torch_kernels, "_FEW_PRODUCTS", 0)
    layer, x = nn.Conv2d(16, 32, 3, padding=1), torch.randn(3, 16, 9, 9)
    packed = packed_layer(layer)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    expected = packed(x)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert torch.equal(packed(x), expected)


def test_column_sums_are_those_that_a_call_would_make():
    packed = packed_layer(nn.Conv2d(8, 32, 3, groups=2))
    x = torch.randn(2, 8, 6, 6)
    assert packed.sums.numel() > 0
    expected = packed(x)
    assert torch.equal(_without_sums(packed)(x), expected)
    packed.sums.add_(1)
    assert not torch.equal(packed(x), expected)  # they are used


def _without_sums(layer):
    result = copy.deepcopy(layer)
    result.sums = torch.zeros(0, 0, dtype=torch.int32)
    return result


def test_a_batch_of_nothing():
    assert packed_layer(nn.Linear(32, 16))(torch.zeros(0, 32)).shape == (0, 16)
    assert packed_layer(nn.Conv1d(16, 16, 3))(torch.zeros(0, 16, 8)).shape == (0, 16, 6)
    empty = torch.zeros(0, 2, dtype=torch.int64)
    assert packed_layer(nn.Embedding(9, 8))(empty).shape == (0, 2, 8)


def test_inputs_need_not_be_contiguous():
    packed = packed_layer(nn.Conv2d(16, 16, 3))
    x = torch.randn(2, 16, 6, 6)
    assert torch.equal(packed(x.to(memory_format=torch.channels_last)), packed(x))


@pytest.mark.parametrize("name", ["linear", "conv2d groups", "embedding"])
@pytest.mark.filterwarnings("ignore")
def test_operators_pass_the_checks_of_torch(name):
    if name == "embedding":
        layer = packed_layer(nn.Embedding(20, 8))
        arguments = (torch.tensor([1, 19]), *layer.stored(), "e2m3", 20, 8)
        torch.library.opcheck(torch.ops.afpq.embedding.default, arguments)
        unpack = (*layer.stored(), "e2m3", 20, 8, 0)
        torch.library.opcheck(torch.ops.afpq.unpack.default, unpack)
        return
    make, shape = LAYERS[name]
    layer = packed_layer(make())
    a, x = layer.fields, torch.randn(shape)
    head = (x, *layer.stored(), layer.sums, layer.bias, a.format, a.n, a.k)
    if name == "linear":
        torch.library.opcheck(torch.ops.afpq.linear.default, (*head, 0, "a16", "", 0.0))
    else:
        geometry = layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups
        torch.library.opcheck(torch.ops.afpq.conv.default, (*head, *geometry, "a16", "", 0.0))


@pytest.mark.parametrize(
    ("make", "x", "message"),
    [
        (lambda: nn.Linear(32, 8), torch.zeros(2, 31), "its last axis must be k = 32"),
        (lambda: nn.Conv2d(4, 16, 3), torch.zeros(2, 5, 6, 6), "needs 4 axes with 4 channels"),
        (lambda: nn.Conv2d(4, 16, 3), torch.zeros(2, 4, 6, 2), "smaller than the kernel"),
        (lambda: nn.Embedding(9, 8), torch.tensor([9]), "index 9 is not in the range"),
        (lambda: nn.Embedding(9, 8), torch.zeros(2), "indices are torch.float32"),
    ],
    ids=["width", "channels", "kernel", "index", "type of index"],
)
def test_inputs_that_do_not_fit_are_refused(make, x, message):
    with pytest.raises((ValueError, IndexError), match=message):
        packed_layer(make())(x)


def test_operators_take_float32_only():
    layer = packed_layer(nn.Linear(32, 8))
    with pytest.raises(ValueError, match=r"x is torch.float64, not float32"):
        torch.ops.afpq.linear(
            torch.zeros(1, 32).double(), *layer.stored(), layer.sums, None, "e2m3", 8, 32, 0, "a16", "", 0.0
        )  # fmt: skip


def test_a_state_of_another_format_can_be_loaded():
    layer = nn.Linear(32, 24)
    small, large = packed_layer(layer, fmt=AfpFormat(0, 2)), packed_layer(layer, kind="integer")
    x = torch.randn(3, 32)
    small.load_state_dict(large.state_dict())
    assert str(small) == str(large)
    assert torch.equal(small(x), large(x))
    bare = packed_layer(nn.Linear(32, 24, bias=False))
    small.load_state_dict(bare.state_dict())
    assert small.bias is None and torch.equal(small(x), bare(x))
    small.load_state_dict(large.state_dict())
    assert torch.equal(small(x), large(x))


def test_states_that_do_not_fit_are_refused():
    layer = packed_layer(nn.Linear(32, 24))
    other = packed_layer(nn.Linear(24, 32)).state_dict()
    with pytest.raises(RuntimeError, match=r"the weight is \[32, 24\], the layer needs \[24, 32\]"):
        packed_layer(nn.Linear(32, 24)).load_state_dict(other)
    state = layer.state_dict()
    broken = {
        "attributes are not those": {"attributes": torch.zeros(3, dtype=torch.uint8)},
        "codes are torch.uint8": {"codes": state["codes"][:-1]},
        "scales are torch.float32": {"scale": state["scale"].float()},
        r"scales have shape \[2\]": {"scale": state["scale"][:2]},
        "the bias does not fit": {"bias": torch.zeros(3)},
    }
    for message, part in broken.items():
        with pytest.raises(RuntimeError, match=message):
            packed_layer(nn.Linear(32, 24)).load_state_dict(state | part)
    del state["codes"]
    with pytest.raises(RuntimeError, match="codes"):
        packed_layer(nn.Linear(32, 24)).load_state_dict(state)
    with pytest.raises(ModelError, match="codes are"):
        pack_layer(nn.Linear(8, 8), _cut(nn.Linear(8, 8)))


def _cut(layer):
    packed = packed_of(layer)
    return Packed(packed.attributes, packed.codes[:-1], packed.scale, packed.bias)


def test_casts_of_a_module_leave_packed_weights_alone():
    layer = nn.Sequential(nn.Linear(32, 16), nn.LayerNorm(16))
    layer[0] = packed_layer(layer[0])
    before = {name: tensor.clone() for name, tensor in layer[0].state_dict().items()}
    layer.half()
    assert layer[1].weight.dtype == torch.float16
    for name, tensor in layer[0].state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_copies_keep_what_is_shared():
    table = nn.Embedding(40, 16)
    head = nn.Linear(16, 40)
    head.weight = table.weight
    owner = packed_layer(table)
    packed = packed_of(head, shares="0")
    shared = pack_layer(head, Packed(packed.attributes, None, None, packed.bias, owner))
    both = copy.deepcopy(nn.Sequential(owner, shared))
    assert both[1].stored()[0] is both[0].codes
    assert sorted(both.state_dict()) == [
        "0.attributes", "0.codes", "0.scale", "1.attributes", "1.bias",
    ]  # fmt: skip


def test_which_layers_have_a_packed_form():
    class Scaled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    class Named(nn.Linear):
        pass

    assert kind_of(Named(2, 2)) == "matmul"
    assert kind_of(nn.Conv3d(2, 2, 1)) == "conv"
    assert kind_of(nn.Embedding(2, 2)) == "gather"
    for other in (Scaled(2, 2), nn.Embedding(2, 2, max_norm=1), nn.ConvTranspose1d(2, 2, 1)):
        assert kind_of(other) is None


def test_scales_are_bfloat16_as_they_are_stored():
    packed = packed_of(nn.Linear(32, 16))
    stored = packed.scale.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(stored.astype(np.float32), packed.scale.float().numpy())
