r"""How rows lie on disk: float32, bfloat16, float16, or 8 bits with a scale for every 64 numbers.

In 8 bits a stretch of 64 numbers is $x_i \approx s\, q_i$ with $q_i$ whole numbers of at most 127 and $s = \max |x| /
127$, itself in bfloat16: 1.03 bytes a number. Row by row beside them lies the squared length of what is stored.

The numbers are those of a row, or of its low-rank factors.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from headwater.core.index.low_rank import LowRank

Dtype = Literal["float32", "bfloat16", "float16", "int8"]
STRETCH = 64  # numbers that share a scale
_LEVELS = 127


@dataclass(frozen=True)
class Encoding:
    """A dtype and the number of numbers in a row.

    Args:
        dtype: How a number is stored.
        dim: Numbers of a row.
        factors: Rows are stored as low-rank factors; None for whole rows.

    Raises:
        ValueError: There is no such dtype, or the factors are of rows of another length.
    """

    dtype: Dtype
    dim: int
    factors: LowRank | None = None

    def __post_init__(self):
        if self.dtype not in get_args(Dtype):
            offered = ", ".join(get_args(Dtype))
            raise ValueError(f"Expected rows as one of {offered}; got {self.dtype!r}.")
        if self.factors is not None and self.factors.dim != self.dim:
            raise ValueError(
                f"Expected factors of rows of {self.dim} numbers; got those of {self.factors.dim}."
            )

    @property
    def numbers(self) -> int:
        """Numbers that are stored of a row."""
        return self.dim if self.factors is None else self.factors.numbers

    @property
    def in_place(self) -> bool:
        """Whether rows are read as they lie on the disk."""
        return self.dtype == "float32" and self.factors is None

    @property
    def parts(self) -> dict[str, tuple[torch.dtype, int]]:
        """Tensors of a file, (row, numbers) each: their types, and how many numbers a row has in them."""
        found = {"rows": (getattr(torch, self.dtype), self.numbers)}
        if self.dtype == "int8":
            found["scales"] = (torch.bfloat16, -(-self.numbers // STRETCH))
        return found

    @property
    def bytes_per_row(self) -> int:
        """Bytes of a row, with its squared length."""
        return 4 + sum(dtype.itemsize * n for dtype, n in self.parts.values())

    def encode(self, rows: Float[Tensor, "n dim"]) -> dict[str, Tensor]:
        """What is stored of rows.

        Raises:
            FloatingPointError: A number is not finite, or too large for the type.
        """
        numbers = rows if self.factors is None else self.factors.pack(rows)
        if self.dtype != "int8":
            stored = {"rows": numbers.to(getattr(torch, self.dtype))}
        else:
            short = -self.numbers % STRETCH
            padded = torch.nn.functional.pad(numbers.float(), (0, short))
            parts = padded.unflatten(1, (-1, STRETCH))
            scales = (parts.abs().amax(-1) / _LEVELS).to(torch.bfloat16)
            whole = (parts / scales.float().clamp(min=1e-38)[..., None]).round_()
            whole = whole.clamp_(-_LEVELS, _LEVELS).nan_to_num_(0)
            stored = {"rows": whole.to(torch.int8).flatten(1)[:, : self.numbers], "scales": scales}
        finite = stored.get("scales", stored["rows"]).isfinite().all()
        if not bool(finite):
            whole = bool(rows.isfinite().all())
            raise FloatingPointError(
                f"A gradient has numbers that {self.dtype} cannot hold; build the index with dtype='bfloat16'."
                if whole
                else "A gradient holds NaN or infinity; look at the examples, or at the model's weights."
            )
        return {name: tensor.contiguous() for name, tensor in stored.items()}

    def decode(
        self, stored: dict[str, Tensor], out: Float[Tensor, "n dim"] | None = None
    ) -> Float[Tensor, "n dim"]:
        """Rows in float32, in `out` where it is given; rows that are float32 already come as they are."""
        if self.factors is not None:
            return self.factors.unpack(self._numbers(stored, None), out)
        return self._numbers(stored, out)

    def _numbers(self, stored: dict[str, Tensor], out: Tensor | None) -> Tensor:
        if self.dtype == "float32":
            return stored["rows"]
        rows = stored["rows"].float() if out is None else out.copy_(stored["rows"])
        if self.dtype != "int8":
            return rows
        if self.numbers % STRETCH == 0:
            rows.unflatten(1, (-1, STRETCH)).mul_(stored["scales"].float()[..., None])
            return rows
        scales = stored["scales"].float().repeat_interleave(STRETCH, dim=1)
        return rows.mul_(scales[:, : self.numbers])


def encoding_of(
    dtype: Dtype, widths: Mapping[str, int], factors: Mapping[str, Any] | None
) -> Encoding:
    """The encoding that an index names.

    Args:
        dtype: How a number is stored.
        widths: Numbers of each layer in a row.
        factors: "rank", and "shapes": (groups, out, in) of each layer; None for whole rows.

    Raises:
        ValueError: The shapes are not those of the widths.
    """
    kept = None
    if factors is not None:
        shapes = {name: tuple(shape) for name, shape in factors["shapes"].items()}
        if {name: prod(shape) for name, shape in shapes.items()} != dict(widths):
            raise ValueError("the factors are not those of the layers")
        kept = LowRank(factors["rank"], tuple(shapes[name] for name in widths))
    return Encoding(dtype, sum(widths.values()), kept)
