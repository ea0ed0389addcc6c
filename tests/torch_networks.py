"""Networks of the shared folder as torch modules, with the weights of their ONNX files."""

from pathlib import Path

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    """Two convolutions and a shortcut: every second pixel, with channels of zeros around them (option A)."""

    def __init__(self, num_inputs: int, num_outputs: int, stride: int, norm: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_inputs, num_outputs, 3, stride, padding=1, bias=not norm)
        self.conv2 = nn.Conv2d(num_outputs, num_outputs, 3, padding=1, bias=not norm)
        self.bn1 = nn.BatchNorm2d(num_outputs) if norm else nn.Identity()
        self.bn2 = nn.BatchNorm2d(num_outputs) if norm else nn.Identity()
        self.stride, self.added = stride, (num_outputs - num_inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
            x = functional.pad(x, (0, 0, 0, 0, self.added, self.added))
        return functional.relu(y + x)


class ResNet20(nn.Module):
    """[N, 3, 32, 32] -> logits [N, 10]."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=not norm)
        self.bn1 = nn.BatchNorm2d(16) if norm else nn.Identity()
        widths = ((16, 16, 1), (16, 32, 2), (32, 64, 2))
        for number, (num_inputs, num_outputs, stride) in enumerate(widths, 1):
            blocks = [Block(num_inputs, num_outputs, stride, norm)]
            blocks += [Block(num_outputs, num_outputs, 1, norm) for _ in range(2)]
            setattr(self, f"layer{number}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(functional.avg_pool2d(x, x.shape[3]).flatten(1))


def resnet20(file: Path) -> nn.Module:
    """From resnet20.onnx, or resnet20-bn.onnx, whose batch norms are modules of their own."""
    tensors = initializers(file)
    module = ResNet20(norm="bn1.gamma" in tensors)
    for name in module.state_dict():
        place, _, kind = name.rpartition(".")
        if "bn" in place and kind in _NORM:
            tensors[name] = tensors.pop(f"{place}.{_NORM[kind]}")
        elif kind == "num_batches_tracked":
            tensors[name] = torch.zeros((), dtype=torch.int64)
    module.load_state_dict({name: tensors[name] for name in module.state_dict()})
    return module.eval()


_NORM = {"weight": "gamma", "bias": "beta", "running_mean": "mean", "running_var": "var"}


class Attention(nn.Module):
    """Self-attention of 12 heads, and the layer norm behind it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.dense, self.norm = nn.Linear(width, width), nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor, penalty: Tensor) -> Tensor:
        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (12, -1)).transpose(1, 2)

        q, k, v = heads(self.query(x)), heads(self.key(x)), heads(self.value(x))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + penalty
        y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.norm(self.dense(y) + x)


class EncoderLayer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = Attention(width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor, penalty: Tensor) -> Tensor:
        x = self.attention(x, penalty)
        return self.norm(self.narrow(functional.gelu(self.wide(x))) + x)


class MiniLM(nn.Module):
    """The BERT encoder of all-MiniLM-L6-v2: ids, mask and types [N, length] -> [N, length, 384]."""

    def __init__(self, vocabulary: int = 30522, width: int = 384, depth: int = 6) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.positions, self.types = nn.Embedding(512, width), nn.Embedding(2, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.layers = nn.ModuleList(EncoderLayer(width) for _ in range(depth))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        place = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.words(input_ids) + self.types(token_type_ids) + self.positions(place)
        x = self.norm(x)
        penalty = (1.0 - attention_mask[:, None, None].to(x.dtype)) * -10000.0
        for layer in self.layers:
            x = layer(x, penalty)
        return x


# Names in the ONNX file, whose matrices of linear layers have none and lie transposed, in the order of the nodes.
_PARTS = {
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "attention.dense": "attention.output.dense",
    "attention.norm": "attention.output.LayerNorm",
    "wide": "intermediate.dense",
    "narrow": "output.dense",
    "norm": "output.LayerNorm",
}


def minilm(file: Path) -> nn.Module:
    tensors = initializers(file)
    module = MiniLM()
    state = {
        "words.weight": tensors["m.embeddings.word_embeddings.weight"],
        "positions.weight": tensors["m.embeddings.position_embeddings.weight"],
        "types.weight": tensors["m.embeddings.token_type_embeddings.weight"],
    }
    for kind in ("weight", "bias"):
        state[f"norm.{kind}"] = tensors[f"m.embeddings.LayerNorm.{kind}"]
    matrices = iter(tensor for name, tensor in tensors.items() if name.startswith("onnx::MatMul"))
    for number in range(6):
        for ours, theirs in _PARTS.items():
            place, name = f"layers.{number}.{ours}", f"m.encoder.layer.{number}.{theirs}"
            state[f"{place}.bias"] = tensors[f"{name}.bias"]
            linear = f"{name}.weight" not in tensors
            state[f"{place}.weight"] = next(matrices).T if linear else tensors[f"{name}.weight"]
    module.load_state_dict(state)
    return module.eval()


def initializers(file: Path) -> dict[str, Tensor]:
    """Initializers in the order in which nodes read them, as float32."""
    model = onnx.load(file)
    found = {tensor.name: tensor for tensor in model.graph.initializer}
    names = dict.fromkeys(name for node in model.graph.node for name in node.input if name in found)
    return {
        name: torch.from_numpy(numpy_helper.to_array(found[name]).copy()).float() for name in names
    }
