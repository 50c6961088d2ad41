"""Predictions held against retraining, where what retraining does is known."""

import pytest
import torch

from headwater.core.scores import Scores
from headwater.training.verify import Change, Outcome, Verification, changes, verify

N, Q = 12, 3


def effects() -> torch.Tensor:
    """What one more of each example adds to each measurement, exactly (query, train)."""
    return torch.randn(Q, N, generator=torch.Generator().manual_seed(0)).double()


def scores(values: torch.Tensor | None = None, **more) -> Scores:
    values = effects() if values is None else values
    ids = [f"e{i}" for i in range(values.shape[1])]
    queries = [f"q{i}" for i in range(len(values))]
    return Scores(values=values, query_ids=queries, train_ids=ids, **more)


def additive(weights: torch.Tensor, seed: int) -> torch.Tensor:
    """A training run whose outcome is linear in the weights, plus what the seed does to it."""
    return effects() @ weights.double() + 10 * seed


def test_a_linear_outcome_is_predicted_exactly_whatever_the_seed():
    found = verify(additive, scores(), changes(scores(), k=2), seeds=(3, 5))
    assert len(found.outcomes) == 3 * Q and found.protocol == "mean over 2 seeds"
    for outcome in found.outcomes:
        assert outcome.actual == pytest.approx(outcome.predicted, abs=1e-12)
        assert outcome.low == pytest.approx(outcome.high, abs=1e-10)
        expected = effects()[int(outcome.query_id[1])].sum() + 40
        assert outcome.before == pytest.approx(float(expected))


def test_the_top_of_every_query_is_left_out_or_doubled_and_the_control_is_other_examples():
    top, control, twice = changes(scores(), k=2, queries=[0, 2])
    strongest = {int(i) for q in (0, 2) for i in effects()[q].topk(2).indices}
    assert set(top.weights) == set(twice.weights) == strongest
    assert set(top.weights.values()) == {0.0} and set(twice.weights.values()) == {2.0}
    assert control.control and not set(control.weights) & strongest
    assert len(control.weights) == len(strongest)
    assert changes(scores(), k=2, queries=[0, 2])[1] == control
    assert changes(scores(), k=2, queries=[0, 2], seed=1)[1] != control
    assert top.vector(N).sum() == N - len(strongest)


def test_examples_that_lower_a_query_are_not_left_out_for_it():
    values = torch.tensor([[1.0, -1.0, -2.0, -3.0]])
    assert set(changes(scores(values), k=3)[0].weights) == {0}
    with pytest.raises(ValueError, match="No training example raises"):
        changes(scores(-values.abs()), k=3)
    with pytest.raises(ValueError, match="too few to choose as many at random"):
        changes(scores(values.abs()), k=3)


def test_a_ranking_that_knows_beats_chance_and_its_reverse_does_not():
    for q in range(Q):
        right, wrong = scores(effects()[[q]]), scores(-effects()[[q]])

        def retrain(weights, seed, q=q):
            return additive(weights, seed)[[q]]

        assert verify(retrain, right, changes(right, k=2)).beats_chance == [True]
        assert verify(retrain, wrong, changes(wrong, k=2)).beats_chance == [False]


def test_a_known_outcome_of_the_original_run_is_not_measured_again():
    seen = []

    def retrain(weights, seed):
        seen.append(weights.tolist())
        return additive(weights, seed)

    before = additive(torch.ones(N), 0)
    known = verify(retrain, scores(), changes(scores(), k=1), before=before)
    assert len(seen) == 3 and [1.0] * N not in seen
    measured = verify(retrain, scores(), changes(scores(), k=1))
    assert known.outcomes == measured.outcomes
    assert (known.facts["runs"], measured.facts["runs"]) == (3, 4)


def test_finished_runs_are_read_after_a_kill(tmp_path):
    calls = []

    def dies_late(weights, seed):
        calls.append(seed)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return additive(weights, seed)

    with pytest.raises(KeyboardInterrupt):
        verify(dies_late, scores(), changes(scores(), k=2), cache=tmp_path)
    found = verify(dies_late, scores(), changes(scores(), k=2), cache=tmp_path)
    assert len(calls) == 3 + 2  # four runs, two of them before the kill
    assert found == verify(additive, scores(), changes(scores(), k=2))


def test_comes_back_from_its_file(tmp_path):
    found = verify(additive, scores(), changes(scores(), k=2), seeds=(0, 1))
    found.save(tmp_path / "v.json")
    assert Verification.load(tmp_path / "v.json") == found
    assert "without the top" in repr(found)


def test_scores_that_were_not_kept_and_outcomes_of_another_shape_are_refused():
    some = scores(kept=list(range(0, 2 * N, 2)), n_train=2 * N)
    change = Change(name="without it", weights={1: 0.0})
    with pytest.raises(ValueError, match="example 1 has no score; score with keep=None"):
        verify(additive, some, [change])
    with pytest.raises(ValueError, match=r"one number for each of 3 queries; got shape \(2,\)"):
        verify(lambda weights, seed: torch.zeros(2), scores(), changes(scores(), k=1))


def test_the_control_is_drawn_from_all_examples_or_not_at_all():
    some = scores(kept=list(range(0, 2 * N, 2)), n_train=2 * N)
    with pytest.raises(ValueError, match=r"strongest 12 of 24 .* score with keep=None"):
        changes(some, k=2)
    whole = scores(kept=list(range(N)), n_train=N)
    assert changes(whole, k=2) == changes(scores(), k=2)


def test_changes_without_a_control_are_shown_without_a_verdict(capsys):
    from headwater.report.verification import show

    found = verify(additive, scores(), [Change(name="less of it", weights={0: 0.5})])
    assert found.beats_chance == []
    show(found)
    out = capsys.readouterr().out
    assert "less of it" in out and "at random" not in out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"seeds": ()}, "one seed or more"),
        ({"before": torch.zeros(2)}, r"before must be .* 3 queries; got shape \(2,\)"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused_before_any_is_made(options, said):
    with pytest.raises(ValueError, match=said):
        verify(lambda weights, seed: pytest.fail("trained"), scores(), **options)


def test_scores_without_a_unit_predict_no_change():
    order = scores(facts={"unit": ""})
    with pytest.raises(ValueError, match="no unit, only an order: they predict no change"):
        verify(lambda weights, seed: pytest.fail("trained"), order, changes(order, k=1))


def test_a_run_that_diverged_is_an_error_that_names_the_change():
    def diverges(weights, seed):
        return additive(weights, seed) * (torch.nan if weights.max() == 2 else 1)

    with pytest.raises(
        FloatingPointError, match="'with the top 3 twice' with seed 0 the measurement"
    ):
        verify(diverges, scores(), changes(scores(), k=1))


def test_choices_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="k must be 1 or more; got 0"):
        changes(scores(), k=0)
    with pytest.raises(ValueError, match="There are 3 queries, from 0; got 3"):
        changes(scores(), queries=[0, 3])


def test_a_change_exceeds_chance_by_how_far_it_moves_and_not_by_where_to():
    def outcome(query: str, control: bool, actual: float) -> Outcome:
        return Outcome(
            query_id=query,
            change="random" if control else "2 weighted (mine)",
            control=control,
            n_changed=2,
            predicted=0.0,
            actual=actual,
            before=0.0,
        )

    moved = {"up": (2.0, -1.0), "down": (-2.0, 1.0), "less": (0.5, -1.0)}
    outcomes = [
        outcome(query, control, actual)
        for query, pair in moved.items()
        for control, actual in zip((False, True), pair, strict=True)
    ]
    alone = outcome("alone", False, 1.0)
    found = Verification(
        outcomes=(*outcomes, alone), measurement="log_prob", protocol="same run", facts={}
    )
    assert found.exceeds_chance == [True, True, False] and found.beats_chance == []
