"""Calibrate: how sure one may be, with guarantees that need no model of the data.

Batch predictive inference bounds what many unseen outcomes have in common (`quantile_bound`, `coverage_bound`,
`mean_bound` and others), and puts error control on claims: `select` says which examples are wrong and how many of
those claims may be false.
"""

from headwater.calibrate.batch_predictive import (
    BatchBound,
    accept_shifted,
    composed_bound,
    coverage_bound,
    mean_bound,
    order_at,
    quantile_bound,
    quantiles_bound,
    split_conformal_coverage,
)
from headwater.calibrate.claims import ClaimCurve, Selection, claim_curve, draw_sample, select

__all__ = [
    "BatchBound",
    "ClaimCurve",
    "Selection",
    "accept_shifted",
    "claim_curve",
    "composed_bound",
    "coverage_bound",
    "draw_sample",
    "mean_bound",
    "order_at",
    "quantile_bound",
    "quantiles_bound",
    "select",
    "split_conformal_coverage",
]
