r"""How rows lie on disk: float32, bfloat16, float16, or 8 bits with a scale for every 64 numbers.

In 8 bits a stretch of 64 numbers is $x_i \approx s\, q_i$ with $q_i$ whole numbers of at most 127 and $s = \max |x| /
127$, itself in bfloat16: 1.03 bytes a number. Row by row beside them lies the squared length of what is stored.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

Dtype = Literal["float32", "bfloat16", "float16", "int8"]
STRETCH = 64  # numbers that share a scale
_LEVELS = 127


@dataclass(frozen=True)
class Encoding:
    """A dtype and the number of numbers in a row.

    Raises:
        ValueError: There is no such dtype.
    """

    dtype: Dtype
    dim: int

    def __post_init__(self):
        if self.dtype not in get_args(Dtype):
            offered = ", ".join(get_args(Dtype))
            raise ValueError(f"Expected rows as one of {offered}; got {self.dtype!r}.")

    @property
    def parts(self) -> dict[str, tuple[torch.dtype, int]]:
        """Tensors of a file, (row, numbers) each: their types, and how many numbers a row has in them."""
        found = {"rows": (getattr(torch, self.dtype), self.dim)}
        if self.dtype == "int8":
            found["scales"] = (torch.bfloat16, -(-self.dim // STRETCH))
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
        if self.dtype != "int8":
            stored = {"rows": rows.to(getattr(torch, self.dtype))}
        else:
            short = -self.dim % STRETCH
            parts = torch.nn.functional.pad(rows.float(), (0, short)).unflatten(1, (-1, STRETCH))
            scales = (parts.abs().amax(-1) / _LEVELS).to(torch.bfloat16)
            whole = (parts / scales.float().clamp(min=1e-38)[..., None]).round_()
            whole = whole.clamp_(-_LEVELS, _LEVELS).nan_to_num_(0)
            stored = {"rows": whole.to(torch.int8).flatten(1)[:, : self.dim], "scales": scales}
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
        if self.dtype == "float32":
            return stored["rows"]
        rows = stored["rows"].float() if out is None else out.copy_(stored["rows"])
        if self.dtype != "int8":
            return rows
        if self.dim % STRETCH == 0:
            rows.unflatten(1, (-1, STRETCH)).mul_(stored["scales"].float()[..., None])
            return rows
        return rows.mul_(stored["scales"].float().repeat_interleave(STRETCH, dim=1)[:, : self.dim])
