import json
from dataclasses import replace

from headwater.core.doctor import examine
from headwater.core.task import Classification
from tests.doctor_cases import images, mlp


def test_a_diagnosis_is_rows_json_and_a_short_text():
    calls = []
    diagnosis = examine(
        mlp(6, 3), images(5), Classification(), progress=lambda *step: calls.append(step)
    )
    assert calls[-1] == (4, 4, "gradients")
    assert {"name", "status", "detail", "remedy"} == set(diagnosis.to_rows()[0])
    assert diagnosis.to_rows("layers")[0]["name"] == "0"
    written = json.loads(json.dumps(diagnosis.to_json(), allow_nan=False))
    assert written["ok"] is True
    assert written["coverage"] == 1.0
    assert "rank" in repr(diagnosis) and "repeats" not in repr(diagnosis)
    broken = replace(diagnosis.checks[0], status="fail")
    assert not replace(diagnosis, checks=(broken,)).ok
