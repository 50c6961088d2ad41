"""Promises about batches on real data: the study, small."""

import pytest

pytestmark = pytest.mark.slow


def test_the_study_keeps_promises_and_compares():
    pytest.importorskip("sklearn")
    from studies.batch_predictive import Plan, main, simulated

    said: list[str] = []
    plan = Plan(splits=60, noises=2, draws=30, runs=150, images=("digits",))
    results = main(plan, say=said.append)
    error = 3 * (0.1 * 0.9 / 60) ** 0.5
    for ours, split in results["coverage"].values():
        assert ours / 60 >= 0.9 - error and split < ours
    for eta, (ours, matched) in results["digits numbers"].items():
        assert ours.broken / ours.draws <= 0.1 + error and ours.draws == 60
        # As many false claims on average, up to half of a step between levels of 12 %.
        assert abs(ours.false - matched.false) <= 0.1 * ours.false + 10 or eta == 0
    for tallies in results["digits shares"].values():
        assert tallies["selection"].broken / 60 <= 0.05 + 3 * (0.05 * 0.95 / 60) ** 0.5
    assert results["digits numbers"][5][0].claims > 0
    worlds = results["simulated"]
    assert worlds == simulated(plan, said.append)
    assert all(
        t["selection"].broken / 150 <= 0.1 + 3 * (0.09 / 150) ** 0.5 for t in worlds.values()
    )
    assert "conformal selection" in "\n".join(said)
