"""The torch door on real networks: the module computes what the packed ONNX model does."""

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

from torch_networks import minilm, resnet20  # noqa: E402

import afpq.torch  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture
def photos(shared: Path) -> dict[str, torch.Tensor]:
    found = {}
    for part in ("train", "test"):
        with np.load(shared / f"data/cifar10/{part}.npz") as arrays:
            pixels = arrays["images"][:64].astype(np.float32) / 255
        mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
        images = ((pixels - mean) / std).transpose(0, 3, 1, 2)
        found[part] = torch.from_numpy(np.ascontiguousarray(images))
    return found


@pytest.mark.parametrize("name", ["resnet20.onnx", "resnet20-bn.onnx"])
def test_resnet_gives_the_bits_of_its_onnx_model(
    shared: Path, photos: dict[str, torch.Tensor], name: str
) -> None:
    file = shared / "models/cifar10" / name
    module, x = resnet20(file), photos["test"]
    known = ort.InferenceSession(file)
    wanted = known.run(None, {known.get_inputs()[0].name: x.numpy()})[0]
    with torch.no_grad():
        np.testing.assert_allclose(module(x).numpy(), wanted, atol=1e-4)  # the network is that one

    result = afpq.torch.quantize(module, photos["train"], bits=4.5, mode="quick")

    session = result.model.session()
    packed = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    got = result.module(x).numpy()
    np.testing.assert_array_equal(got, packed)
    assert (got.argmax(1) == wanted.argmax(1)).mean() > 0.9


def test_a_sentence_encoder_is_right_to_the_order_of_float_sums(shared: Path) -> None:
    module = minilm(shared / "models/minilm/all-MiniLM-L6-v2.float16-weights.onnx")
    with np.load(shared / "data/stsb/dev.npz") as arrays:
        ids = arrays["ids_a"][:24, :16].astype(np.int64)
        lengths = np.minimum(arrays["len_a"][:24], 16)
    mask = (np.arange(16) < lengths[:, None]).astype(np.int64)
    names = ("input_ids", "attention_mask", "token_type_ids")
    feed = {n: torch.from_numpy(a) for n, a in zip(names, (ids, mask, 0 * ids), strict=True)}

    formats = {"*": "e2m2"}  # a search among formats is not what this is about
    result = afpq.torch.quantize(module, feed, bits=6, overrides=formats, mode="quick")

    packed = result.model.session().run(None, {n: a.numpy() for n, a in feed.items()})[0]
    got = result.module(**feed).numpy()
    assert np.abs(got - packed).max() < 0.02 * np.abs(packed).max()
    with torch.no_grad():
        wanted = module(**feed).numpy()
    error = np.square(got - wanted)[mask > 0].sum() / np.square(wanted)[mask > 0].sum()
    assert error < 0.05
