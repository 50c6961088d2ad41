"""Forget: change a model's weights so that it no longer does something, reversibly, and see what that costs.

An `Editor` makes a `WeightEdit` from a fit: a difference of weights that is saved with what it was made from, applied,
and undone to the last bit. `CurvatureEdit` removes the directions that recite without being told what is recited;
`SVDTruncation` and `BalancedSubnet` are what it is compared with.
"""

from headwater.forget.balanced_subnet import BalancedSubnet
from headwater.forget.base import Editor, WeightEdit
from headwater.forget.curvature_edit import CurvatureEdit, edit_matrix
from headwater.forget.svd_truncation import SVDTruncation

__all__ = [
    "BalancedSubnet",
    "CurvatureEdit",
    "Editor",
    "SVDTruncation",
    "WeightEdit",
    "edit_matrix",
]
