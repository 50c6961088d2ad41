"""The workloads of `headwater bench`, by name."""

from headwater.bench.image_workloads import IMAGES
from headwater.bench.text_workloads import TEXTS
from headwater.bench.workload import Workload

WORKLOADS: dict[str, Workload] = {workload.name: workload for workload in (*IMAGES, *TEXTS)}
FAST = ("digits-mlp",)
