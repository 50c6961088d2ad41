import json

import pytest

from headwater.core.plan import plan
from headwater.core.task import Classification
from tests.plan_cases import images, mlp


def test_a_plan_is_rows_json_and_a_short_text():
    made = plan(mlp(20, 12, 4), images(), Classification(), curvature="ekfac", n_queries=3)
    rows = made.to_rows()
    assert [row["name"] for row in rows][:4] == [
        "fingerprints",
        "second moments",
        "eigendecompositions",
        "eigenvalues",
    ]
    assert rows[1]["passes"] == pytest.approx(rows[1]["seconds"] / made.pass_seconds)
    assert sum(row["bytes"] for row in made.to_rows("memory")) == made.peak_memory
    written = json.loads(json.dumps(made.to_json(), allow_nan=False))
    assert written["fit_seconds"] == made.seconds("fit")
    assert "eigendecompositions" in repr(made)
