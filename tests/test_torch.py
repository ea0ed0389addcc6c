"""The torch door: every packed layer gives the bits of the ONNX model, states go round, and what cannot be is said."""

import copy
import re
import sys
import warnings

import numpy as np
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402
from torch_networks import initializers  # noqa: E402

import afpq.torch  # noqa: E402
from afpq._build import session_of  # noqa: E402
from afpq.errors import ModelError, PlanError  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Text(nn.Module):
    """A tied table, a layer that is called twice, and attention, which reads its weights by itself."""

    def __init__(self):
        super().__init__()
        self.table, self.twice = nn.Embedding(50, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.table.weight
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, ids):
        x = self.table(ids)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.twice(torch.relu(self.twice(x))))


class Sound(nn.Module):
    """Convolutions of one axis, with batch norm before and behind them, and layers that afpq has no kernel for."""

    def __init__(self):
        super().__init__()
        self.before = nn.BatchNorm1d(6)
        self.same = nn.Conv1d(6, 16, 3, padding="same", dilation=2)
        self.deep = nn.Conv1d(16, 16, 5, 2, 2, groups=16, padding_mode="reflect")
        self.grouped, self.behind = (
            nn.Conv1d(16, 32, 3, 1, 1, groups=2, bias=False),
            nn.BatchNorm1d(32),
        )
        self.up, self.memory = nn.ConvTranspose1d(32, 16, 4, 2), nn.LSTM(16, 12, batch_first=True)
        self.out, self.norm = nn.Linear(12, 9), nn.BatchNorm1d(9)

    def forward(self, x):
        x = functional.relu6(self.same(self.before(x)))
        x = functional.relu(self.behind(self.grouped(functional.relu(self.deep(x)))))
        return self.norm(self.out(self.memory(self.up(x).transpose(1, 2))[0][:, -1]))


def with_statistics(module):
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.running_mean.normal_(0, 0.3)
            part.running_var.uniform_(0.5, 2)
            nn.init.uniform_(part.weight, 0.5, 1.5)
    return module.eval()


@pytest.fixture(scope="module")
def text():
    torch.manual_seed(0)
    batches = [torch.randint(0, 50, (6, length)) for length in (5, 7, 9, 5)]
    module = Text()
    return module, batches, afpq.torch.quantize(module, batches, bits=5, mode="quick")


@pytest.fixture(scope="module")
def sound():
    torch.manual_seed(1)
    module, x = with_statistics(Sound()), torch.randn(24, 6, 20)
    return module, x, afpq.torch.quantize(module, x, bits=6, mode="quick")


@pytest.fixture(scope="module")
def lenet(models):
    sys.path.insert(0, str(models))
    try:
        from train_lenet5 import lenet5
    finally:
        sys.path.remove(str(models))
    module = lenet5()
    module.load_state_dict(initializers(models / "lenet5_digits.onnx"))
    return module


@pytest.fixture(scope="module")
def images(models):
    with np.load(models / "digits_calibration.npz") as file:
        return torch.from_numpy(file["input"][:64])


@pytest.fixture(scope="module")
def packed_lenet5(lenet, images):
    return afpq.torch.quantize(lenet, images, bits=4, mode="quick")


def run_onnx(result, *arguments):
    session = result.model.session(threads=1)
    names = [entry.name for entry in session.get_inputs()]
    return session.run(None, dict(zip(names, (a.numpy() for a in arguments))))[0]


def assert_layers_give_the_same_bits(result, x):
    """Each packed layer, on the very input that it has in the ONNX model."""
    model = result.model.packed.clone()
    nodes = [node for node in model.graph if node.domain == "afpq" and node.op_type != "Unpack"]
    kept = {value.name for value in model.graph.outputs}
    for node in nodes:
        for value in (node.inputs[2 if node.op_type == "Gather" else 0], node.outputs[0]):
            if value.name not in kept and not value.is_graph_input():
                value.type = ir.TensorType(ir.DataType.FLOAT)
                model.graph.outputs.append(value)
                kept.add(value.name)
    session = session_of(model, 1)
    name = session.get_inputs()[0].name
    values = session.run(None, {name: x.numpy()})
    values = dict(zip([o.name for o in session.get_outputs()], values)) | {name: x.numpy()}
    for node in nodes:
        layer = result.module.get_submodule(re.sub(r"_\d+$", "", node.name))
        given = values[node.inputs[2 if node.op_type == "Gather" else 0].name]
        if node.inputs[0].producer() is not None and node.inputs[0].producer().op_type == "Pad":
            given = given[..., 2:-2]  # by a node of its own there, by the layer here
        y = layer(torch.from_numpy(given)).numpy()
        low, high = (node.attributes.get(f"clip_{end}") for end in ("min", "max"))
        if low is not None or high is not None:
            y = np.clip(y, low and low.value, high and high.value)
        np.testing.assert_array_equal(y, values[node.outputs[0].name], err_msg=node.name)
    return {node.name for node in nodes}


def kinds(module):
    parts = module.named_modules()
    return {path: type(m).__name__ for path, m in parts if type(m).__name__.startswith("Afp")}


def test_a_network_of_layers_gives_the_bits_of_its_onnx_model(packed_lenet5, lenet, images):
    x = images[:7]
    np.testing.assert_array_equal(packed_lenet5.module(x).numpy(), run_onnx(packed_lenet5, x))
    assert packed_lenet5.notes == ()
    assert list(kinds(packed_lenet5.module)) == ["0", "3", "7", "9", "11"]
    assert isinstance(lenet[0], nn.Conv2d) and lenet[0].weight.requires_grad  # as it was
    agree = packed_lenet5.module(images).argmax(1) == lenet.eval()(images).argmax(1)
    assert agree.float().mean() > 0.9


@pytest.mark.parametrize(
    "options",
    [{"activations": "a8"}, {"activations": "f32"}, {"kind": "integer", "activations": "a8"}],
    ids=["a8", "f32", "integer a8"],
)
def test_every_way_to_round_gives_the_bits_of_the_onnx_model(lenet, images, options):
    result = afpq.torch.quantize(lenet, images[:24], bits=5, mode="quick", **options)
    np.testing.assert_array_equal(result.module(images).numpy(), run_onnx(result, images))
    fields = result.module[7].fields
    assert fields.activations == options["activations"]
    node = next(n for n in result.model.packed.graph if n.name.startswith("7"))
    assert fields.activation_format == node.attributes.get_string("activation_format", "")
    assert (result.module[7].scale.dtype == torch.int8) == ("kind" in options)


def test_layers_of_a_text_network(text):
    _, batches, result = text
    assert kinds(result.module) == {
        "table": "AfpEmbedding", "twice": "AfpLinear", "head": "AfpLinear",
    }  # fmt: skip
    assert result.module.head.stored()[0] is result.module.table.codes
    names = assert_layers_give_the_same_bits(result, batches[1])
    assert names == {"table", "twice", "twice_2", "head"}
    for ids in batches:  # whose lengths differ
        np.testing.assert_allclose(
            result.module(ids).numpy(), run_onnx(result, ids), rtol=1e-3, atol=1e-3
        )


def test_what_stays_float_is_named_on_both_sides(text, sound):
    expected = ["attention.in_proj_weight stays float", "attention.out_proj.weight stays float"]
    assert [note.split(":")[0] for note in text[2].notes[:2]] == expected
    assert text[2].notes[2:] == (
        "twice is called 2 times: its bias is the mean of those for its places",
    )
    assert [note.split(" ")[0] for note in sound[2].notes] == [
        "up.weight", "memory.weight_ih_l0", "memory.weight_hh_l0",
    ]  # fmt: skip
    for _, _, result in (text, sound):
        assert not [n for n in result.model.packed.graph if n.op_type == "Unpack"]
        assert {
            n.name.removesuffix("_2") for n in result.model.packed.graph if n.domain == "afpq"
        } == set(kinds(result.module))


def test_a_layer_with_several_places_leaves_no_claim_about_accuracy(text, sound):
    assert text[2].model.facts.accuracy is None
    assert sound[2].model.facts.accuracy is not None


def test_convolutions_and_batch_norm(sound):
    module, x, result = sound
    assert kinds(result.module) == {
        "same": "AfpConv", "deep": "AfpConv", "grouped": "AfpConv", "out": "AfpLinear",
    }  # fmt: skip
    assert isinstance(result.module.behind, nn.Identity) and isinstance(
        result.module.norm, nn.Identity
    )
    assert isinstance(result.module.before, nn.BatchNorm1d) and isinstance(
        module.behind, nn.BatchNorm1d
    )
    assert assert_layers_give_the_same_bits(result, x[:5]) == set(kinds(result.module))
    np.testing.assert_allclose(result.module(x).numpy(), run_onnx(result, x), atol=1e-4)


def test_constants_that_afpq_changed_are_changed_in_the_module(monkeypatch):
    torch.manual_seed(2)
    # Without corrected biases restored statistics win.
    monkeypatch.setattr("afpq._ways.correct_biases", lambda *_: {})
    module = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.BatchNorm2d(16), nn.Conv2d(16, 8, 3))
    x = torch.randn(40, 3, 8, 8)
    result = afpq.torch.quantize(
        with_statistics(module), x, overrides={"0": "e0m1"}, bits=4, mode="quick"
    )
    kept = {v.name: v.const_value.numpy() for v in result.model.packed.graph.initializers.values()}
    mean = result.module[2].running_mean.numpy()
    np.testing.assert_array_equal(mean, kept["2.running_mean"])
    assert (mean != module[2].running_mean.numpy()).any()
    np.testing.assert_allclose(result.module(x[:3]).numpy(), run_onnx(result, x[:3]), atol=1e-4)


def test_a_state_rebuilds_the_module(text, sound, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    for module, data, result in (text, sound):
        file = tmp_path / "packed.safetensors"
        safetensors.save_file(result.module.state_dict(), file)
        again = afpq.torch.load(type(module)(), safetensors.load_file(file))
        x = data[:3] if isinstance(data, torch.Tensor) else data[0]
        assert torch.equal(again(x), result.module(x))
        types = {t.dtype for n, t in again.state_dict().items() if not n.endswith("tracked")}
        assert types <= {torch.uint8, torch.bfloat16, torch.int8, torch.float32}
    assert (
        "head.codes" not in safetensors.load_file(file)
        and "head.codes" not in text[2].module.state_dict()
    )


def test_states_of_other_modules_are_refused(text, packed_lenet5):
    module, _, result = text
    state = result.module.state_dict()
    with pytest.raises(ModelError, match="the state has no packed layer"):
        afpq.torch.load(module, module.state_dict())
    with pytest.raises(ModelError, match="the state lacks 'table', whose weight it shares"):
        afpq.torch.load(module, {n: t for n, t in state.items() if not n.startswith("table")})
    with pytest.raises(ModelError, match="twice: the state lacks its codes or scales"):
        afpq.torch.load(module, {n: t for n, t in state.items() if n != "twice.codes"})
    with pytest.raises(ModelError, match="the state does not fit Text"):
        afpq.torch.load(module, state | {"more": torch.zeros(1)})
    renamed = {n.replace("twice.", "attention."): t for n, t in state.items()}
    with pytest.raises(
        ModelError, match="attention is packed in the state, and a MultiheadAttention"
    ):
        afpq.torch.load(module, renamed)
    wider = nn.Sequential(nn.Conv2d(1, 7, 5))
    with pytest.raises(ModelError, match=r"0: the weight is \[6, 25\], the layer needs \[7, 25\]"):
        afpq.torch.load(wider, packed_lenet5.module.state_dict())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_modules_give_the_same_bits(packed_lenet5, images, backend):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(packed_lenet5.module, backend=backend, fullgraph=True)
        for count in (3, 7):
            assert torch.equal(compiled(images[:count]), packed_lenet5.module(images[:count]))


def test_packed_modules_can_be_exported_and_copied(text, packed_lenet5, images):
    axes = ({0: torch.export.Dim.AUTO},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(packed_lenet5.module, (images[:4],), dynamic_shapes=axes)
        tied = torch.export.export(text[2].module, (text[1][0],))
    operators = {str(node.target) for node in program.graph.nodes if "afpq" in str(node.target)}
    assert operators == {"afpq.conv.default", "afpq.linear.default"}
    assert torch.equal(program.module()(images), packed_lenet5.module(images))
    torch.testing.assert_close(
        tied.module()(text[1][0]), text[2].module(text[1][0]), rtol=1e-3, atol=1e-3
    )
    copied = copy.deepcopy(packed_lenet5.module)
    assert torch.equal(copied(images), packed_lenet5.module(images))


def test_transformers_of_torch_run_the_packed_layers():
    torch.manual_seed(3)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    module = nn.TransformerEncoder(layer, 1).eval()
    x = torch.randn(12, 5, 16)
    result = afpq.torch.quantize(module, x, bits=6, mode="quick")
    assert list(kinds(result.module)) == ["layers.0.linear1", "layers.0.linear2"]
    calls = []
    result.module.layers[0].linear2.register_forward_hook(lambda *_: calls.append(1))
    np.testing.assert_allclose(result.module(x).numpy(), run_onnx(result, x), atol=1e-3)
    assert calls
    assert module.layers[0].activation_relu_or_gelu


def test_patterns_and_formats_go_by_paths_of_modules(lenet, images):
    result = afpq.torch.quantize(
        lenet, images[:16], bits=6, mode="quick", exclude=["0", "3"], overrides={"11": "e2m3"}
    )
    assert list(kinds(result.module)) == ["7", "9", "11"]
    assert result.module[11].fields.format == "e2m3"
    # Two convolutions stay float, and torch adds up in another order than onnxruntime.
    np.testing.assert_allclose(result.module(images).numpy(), run_onnx(result, images), atol=1e-3)
    again = afpq.torch.quantize(lenet, images[:16], plan=result.model.plan)
    assert list(kinds(again.module)) == ["7", "9", "11"]
    with pytest.raises(PlanError, match="head"):
        afpq.torch.quantize(lenet, images[:16], bits=6, exclude=["head"])


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.bias = nn.Embedding(20, 16), nn.Linear(16, 16)
        self.hooked, self.plain = nn.Linear(16, 16), nn.Linear(16, 16)
        self.hooked.register_forward_hook(lambda _, __, y: 2 * y)

    def forward(self, ids):
        x = self.plain(self.hooked(self.bias(self.table(ids)) + self.bias.bias))
        return functional.linear(x, self.table.weight)


def test_weights_with_other_readers_stay_float():
    torch.manual_seed(4)
    module, ids = Shared(), torch.randint(0, 20, (16, 4))
    result = afpq.torch.quantize(module, ids, bits=6, mode="quick")
    assert list(kinds(result.module)) == ["plain"]
    # The table is named for each of its two places.
    assert sorted(note.split(" ")[0] for note in result.notes) == [
        "bias.weight", "hooked.weight", "table.weight", "table.weight",
    ]  # fmt: skip
    np.testing.assert_allclose(result.module(ids).numpy(), run_onnx(result, ids), atol=1e-3)
    plan = result.model.plan.to_json()
    with pytest.raises(
        ModelError, match=r"which the torch module cannot: table\.weight stays float"
    ):
        from afpq.plan import Plan

        edited = plan.replace('"format": "float"', '"format": "e2m3"')
        afpq.torch.quantize(module, ids, plan=Plan.from_json(edited), mode="quick")


def test_a_single_layer_is_a_module_too():
    torch.manual_seed(5)
    module, x = nn.Conv3d(2, 16, 3, bias=False), torch.randn(8, 2, 4, 4, 5)
    result = afpq.torch.quantize(module, x, bits=6, mode="quick")
    np.testing.assert_array_equal(result.module(x).numpy(), run_onnx(result, x))
    again = afpq.torch.load(module, result.module.state_dict())
    assert torch.equal(again(x), result.module(x))
