"""What the torch door refuses, by name."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

from torch import nn  # noqa: E402

import afpq.torch  # noqa: E402
from afpq.errors import ModelError  # noqa: E402


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else x


def test_what_cannot_be_quantized_is_refused():
    x = torch.randn(8, 8)
    with pytest.raises(ModelError, match=r"torch\.export refuses Branch"):
        afpq.torch.quantize(Branch(), x)
    attention = nn.TransformerEncoderLayer(16, 2, 4).self_attn

    class Only(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = attention

        def forward(self, x):
            return self.attention(x, x, x)[0]

    with pytest.raises(
        ModelError, match=r"nothing of Only can be packed: attention\.in_proj_weight"
    ):
        afpq.torch.quantize(Only(), torch.randn(8, 4, 16))
    with pytest.raises(TypeError, match="has no option 'bitss'; it has activations"):
        afpq.torch.quantize(nn.Linear(8, 8), x, bitss=4)
    with pytest.raises(TypeError, match="has no option 'chain'"):  # modules pass floats
        afpq.torch.quantize(nn.Linear(8, 8), x, chain=True)


def test_a_module_that_does_not_compute_the_same_is_refused(monkeypatch):
    monkeypatch.setattr(afpq.torch.AfpLinear, "forward", lambda self, input: input)
    with pytest.raises(
        ModelError, match="output 0 of the torch module is not that of the ONNX model"
    ):
        afpq.torch.quantize(nn.Linear(16, 16), torch.randn(8, 16), bits=6, mode="quick")
