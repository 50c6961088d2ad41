"""Headwater traces what a PyTorch model does back to the data that taught it.

    fit = headwater.fit(model, train, task)  # one pass; saved, hashed, reused
    scores = headwater.trace.Influence().attribute(fit, queries)  # (query, train), in nats
    headwater.cite(scores)  # BibTeX for what was used

Everything is imported on first use, so that `import headwater` costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headwater import (
        adapt,
        audit,
        calibrate,
        core,
        curate,
        data,
        forget,
        models,
        numerics,
        report,
        trace,
        training,
    )
    from headwater.core.examples import Examples, TensorExamples
    from headwater.core.fit import fit, load
    from headwater.core.provenance import cite
    from headwater.core.scores import Scores
    from headwater.core.task import (
        CausalLM,
        Classification,
        FunctionTask,
        MaskedLM,
        Regression,
        Seq2Seq,
        Task,
    )

__version__ = "0.1.0"

__all__ = [
    "CausalLM",
    "Classification",
    "Examples",
    "FunctionTask",
    "MaskedLM",
    "Regression",
    "Scores",
    "Seq2Seq",
    "Task",
    "TensorExamples",
    "__version__",
    "adapt",
    "audit",
    "calibrate",
    "cite",
    "core",
    "curate",
    "data",
    "fit",
    "forget",
    "load",
    "models",
    "numerics",
    "report",
    "trace",
    "training",
]

# The module that holds each name which is not a subpackage.
_HOMES = {
    "fit": "headwater.core.fit",
    "load": "headwater.core.fit",
    "cite": "headwater.core.provenance",
    "Examples": "headwater.core.examples",
    "TensorExamples": "headwater.core.examples",
    "Task": "headwater.core.task",
    "Classification": "headwater.core.task",
    "Regression": "headwater.core.task",
    "CausalLM": "headwater.core.task",
    "MaskedLM": "headwater.core.task",
    "Seq2Seq": "headwater.core.task",
    "FunctionTask": "headwater.core.task",
    "Scores": "headwater.core.scores",
}


def __getattr__(name: str) -> Any:
    """Import a public name on its first use (PEP 562)."""
    if name not in __all__:
        offered = ", ".join(__all__)
        raise AttributeError(f"headwater has no {name!r}; it offers {offered}", name=name)
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    else:
        value = import_module(f"headwater.{name}")
    globals()[name] = value  # the next use finds it without coming here
    return value


def __dir__() -> list[str]:
    """List what can be used, whether it has been imported yet or not."""
    return list(__all__)
