"""Bench: every attribution method in one table, on real data, against retraining.

A workload is a model with its recipe and data. Its training set is retrained on random halves, many times, and every
method is asked to predict the outcomes: quality with intervals beside the noise ceiling, cost beside a plain pass.
"""

from headwater.bench.entries import Entry, entries
from headwater.bench.image_workloads import fashion_mnist_workload
from headwater.bench.run import Plan, Report, run_workload
from headwater.bench.table import markdown, pareto_plot
from headwater.bench.workload import Data, Workload
from headwater.bench.workloads import WORKLOADS

__all__ = [
    "WORKLOADS",
    "Data",
    "Entry",
    "Plan",
    "Report",
    "Workload",
    "entries",
    "fashion_mnist_workload",
    "markdown",
    "pareto_plot",
    "run_workload",
]
