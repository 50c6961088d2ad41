"""A dry run: what a fit and a trace will take, before they are spent.

The work itself is measured, on a few batches and for a few seconds, and extrapolated: by positions for passes over
the data, by the cube of the side for decompositions. Nothing is modelled that can be run.
"""

from headwater.core.plan.planning import plan
from headwater.core.plan.summary import Plan, Stage

__all__ = ["Plan", "Stage", "plan"]
