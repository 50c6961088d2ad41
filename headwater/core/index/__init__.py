"""The index: projected gradients of a dataset on disk, made once and asked many questions.

A row of it is a training example's gradient in few coordinates, in which a plain inner product is an influence
(`Whitened`, from a fitted curvature; `LoGra`, from projected gradients alone). Rows lie in shards that never change
once they are sealed, each block of them with a checksum; `index.json` lists them and is replaced as a whole.
"""

from headwater.core.index.answers import Asked
from headwater.core.index.approximate import Approximate
from headwater.core.index.checking import Damage
from headwater.core.index.gradient_index import GradientIndex
from headwater.core.index.live import LiveIndex
from headwater.core.index.outliers import Outlier, Outliers
from headwater.core.index.spaces import LoGra, Whitened

__all__ = [
    "Approximate",
    "Asked",
    "Damage",
    "GradientIndex",
    "LiveIndex",
    "LoGra",
    "Outlier",
    "Outliers",
    "Whitened",
]
