"""Eigendecompositions that do not fail."""

import warnings

import torch
from jaxtyping import Float
from torch import Tensor


def eigh(
    matrix: Float[Tensor, "*lead dim dim"], *, dtype: torch.dtype | None = torch.float64
) -> tuple[Float[Tensor, "*lead dim"], Float[Tensor, "*lead dim dim"]]:
    """Eigenvalues (ascending, none below zero) and eigenvectors of a positive semi-definite matrix.

    They are taken in `dtype`, the matrix's own where it is None; half the digits take about half the time.

    When LAPACK does not converge, a diagonal of 1e-10 of the mean eigenvalue is added, and at last the singular
    value decomposition is taken, which for such matrices is the same thing.

    Raises:
        ValueError: The matrix holds NaN or infinity.

    Example:
        >>> values, vectors = eigh(torch.diag(torch.tensor([3.0, 1.0])))
        >>> values.tolist()
        [1.0, 3.0]
    """
    matrix = matrix.to(matrix.dtype if dtype is None else dtype)
    matrix = (matrix + matrix.mT) / 2
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError(
            "A second moment holds NaN or infinity; look for a diverged model or a broken example."
        )
    jitter = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] * 1e-10
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    for attempt in (matrix, matrix + jitter * eye):
        try:
            values, vectors = torch.linalg.eigh(attempt)
            return values.clamp(min=0), vectors
        except torch.linalg.LinAlgError:
            continue
    warnings.warn(
        "An eigendecomposition did not converge; singular vectors take its place.", stacklevel=2
    )
    vectors, values, _ = torch.linalg.svd(matrix)
    return values.flip(-1), vectors.flip(-1)


def eigvalsh(matrix: Float[Tensor, "*lead dim dim"]) -> Float[Tensor, "*lead dim"]:
    """The eigenvalues alone, as `eigh` has them, at a fraction of its cost."""
    matrix = matrix.double()
    try:
        return torch.linalg.eigvalsh((matrix + matrix.mT) / 2).clamp(min=0)
    except torch.linalg.LinAlgError:
        return eigh(matrix)[0]
