"""Changes of labels, and change sets, held against retraining where its outcome is known."""

import pytest
import torch
from torch import nn

from headwater.core.files import ArtifactDamaged
from headwater.core.scores import Scores
from headwater.training.changes import ChangeSet
from headwater.training.optimizers import SGD
from headwater.training.retraining import Change, StackedRetrain, retrain_all
from headwater.training.verify import verify

N, Q = 10, 2
IDS = [f"e{i}" for i in range(N)]


def effects(seed: int, n: int = N) -> torch.Tensor:
    return torch.randn(Q, n, generator=torch.Generator().manual_seed(seed)).double()


def scores(values: torch.Tensor, ids: list[str]) -> Scores:
    return Scores(values=values, query_ids=[f"q{i}" for i in range(Q)], train_ids=ids)


class Additive:
    """A training whose outcome is linear in the examples: `old` each under its label, `new` under another."""

    def __init__(self, labels: dict[int, int] | None = None):
        self.labels = labels or {}

    def with_labels(self, labels):
        return Additive(labels)

    def __call__(self, weights, seed):
        values = effects(0).clone()
        for number, label in self.labels.items():
            values[:, number] = label * effects(1)[:, number]
        return values @ weights.double()


def test_removing_and_relabelling_are_predicted_exactly_where_outcomes_are_linear():
    changes = ChangeSet(remove=("e1",), relabel={"e4": 2, "e7": 3})
    planned = changes.planned(IDS)
    new = scores(effects(1)[:, [4, 7]] * torch.tensor([2.0, 3.0]).double(), ["e4", "e7"])
    found = verify(Additive(), scores(effects(0), IDS), planned, relabelled=new)
    assert len(found.outcomes) == 3 * Q
    for outcome in found.outcomes:
        # the scores are kept as float32
        assert outcome.actual == pytest.approx(outcome.predicted, abs=1e-6)
        assert outcome.n_changed == 3


def test_a_plan_is_the_changes_the_same_left_out_and_a_control_of_others():
    first, without, control = ChangeSet(name="c", remove=("e1",), relabel={"e4": 2}).planned(IDS)
    assert first.weights == {1: 0.0} and first.labels == {4: 2}
    assert first.name == "without 1, 1 relabelled (c)"
    assert without.weights == {1: 0.0, 4: 0.0} and not without.labels
    assert control.control and len(control.weights) == 2 and not {1, 4} & set(control.weights)
    assert ChangeSet(remove=("e1", "e4")).planned(IDS, seed=1)[1] != control
    assert len(ChangeSet(remove=("e1",)).planned(IDS)) == 2


def test_weights_are_predicted_exactly_where_outcomes_are_linear():
    changes = ChangeSet(remove=("e1",), weights={"e4": 2.0, "e7": 0.25})
    planned = changes.planned(IDS)
    found = verify(Additive(), scores(effects(0), IDS), planned)
    assert len(planned) == 2 and len(found.outcomes) == 2 * Q
    values = effects(0)
    moved = -values[:, 1] + values[:, 4] - 0.75 * values[:, 7]
    for q, outcome in enumerate(found.outcomes[:Q]):
        assert outcome.actual == pytest.approx(float(moved[q]), abs=1e-6)
        assert outcome.predicted == pytest.approx(float(moved[q]), abs=1e-6)


def test_the_control_of_a_change_set_with_weights_does_the_same_to_others():
    changes = ChangeSet(name="c", remove=("e1",), relabel={"e3": 1}, weights={"e4": 2.0, "e7": 0.5})
    first, without, control = changes.planned(IDS)
    assert first.name == "without 1, 1 relabelled, 2 weighted (c)"
    assert first.weights == {1: 0.0, 4: 2.0, 7: 0.5} and first.labels == {3: 1}
    assert without.weights == {1: 0.0, 3: 0.0, 4: 2.0, 7: 0.5}
    assert sorted(control.weights.values()) == [0.0, 0.0, 0.5, 2.0] and control.control
    assert not {1, 3, 4, 7} & set(control.weights)
    assert control.name == "without 2, 2 weighted alike at random"
    assert len(changes) == 4


def test_the_control_of_removals_is_what_it_was_before_there_were_weights():
    control = ChangeSet(remove=("e1", "e4")).planned(IDS, seed=3)[1]
    rest = [i for i in range(N) if i not in (1, 4)]
    drawn = torch.randperm(len(rest), generator=torch.Generator().manual_seed(3))[:2].tolist()
    assert control == Change(
        name="without 2 at random",
        weights={i: 0.0 for i in sorted(rest[d] for d in drawn)},
        control=True,
    )


def test_a_change_set_gives_the_weights_of_a_training_and_comes_back_from_its_file(tmp_path):
    changes = ChangeSet(name="c", remove=("e1",), keep=("e2",), weights={"e4": 2.5})
    assert changes.training_weights() == {"e1": 0.0, "e4": 2.5}
    changes.save(tmp_path / "changes.json")
    assert ChangeSet.load(tmp_path / "changes.json") == changes
    with pytest.raises(
        ValueError, match=r"1 examples other labels, such as 'e3'\. A language model"
    ):
        ChangeSet(relabel={"e3": 1}).training_weights()


@pytest.mark.parametrize("weight", [0.0, -1.0, float("inf"), float("nan")])
def test_weights_are_positive_and_finite(weight):
    with pytest.raises(ValueError, match="weight of 'e1' must be a positive number"):
        ChangeSet(weights={"e1": weight})


def test_what_cannot_be_planned_is_refused_by_name():
    with pytest.raises(ValueError, match="such as 'nobody'"):
        ChangeSet(remove=("nobody",)).planned(IDS)
    with pytest.raises(ValueError, match="changes nothing"):
        ChangeSet(keep=("e1",)).planned(IDS)
    with pytest.raises(ValueError, match="too few to choose as many at random"):
        ChangeSet(remove=tuple(IDS[:6])).planned(IDS)
    with pytest.raises(ValueError, match="'e1' is named twice"):
        ChangeSet(remove=("e1",), keep=("e1",))
    with pytest.raises(ValueError, match="'e1' is named twice"):
        ChangeSet(remove=("e1",), weights={"e1": 2.0})
    with pytest.raises(ValueError, match="such as 'nobody'"):
        ChangeSet(weights={"nobody": 2.0}).planned(IDS)


def test_relabelling_needs_scores_under_the_new_labels_and_a_training_that_can():
    planned = ChangeSet(relabel={"e4": 2}).planned(IDS)
    with pytest.raises(ValueError, match="pass their scores under these labels"):
        verify(Additive(), scores(effects(0), IDS), planned)
    new = scores(effects(1)[:, [4]], ["e4"])
    with pytest.raises(ValueError, match=r"give it a method with_labels\(labels\)"):
        verify(
            lambda weights, seed: torch.zeros(Q),
            scores(effects(0), IDS),
            planned,
            relabelled=new,
        )


def test_models_trained_side_by_side_take_new_labels(tmp_path):
    x = torch.randn(N, 3, generator=torch.Generator().manual_seed(2))
    y = torch.arange(N) % 2

    def retrain(labels):
        return StackedRetrain(
            make_model=lambda seed: nn.Linear(3, 2),
            train_data=(x, labels),
            query_data=(x[:Q], y[:Q]),
            optimizer=SGD(lr=0.1, epochs=2, batch_size=5),
        )

    torch.manual_seed(0)
    make = retrain(y).make_model
    start = make(0)
    for one in (again := retrain(y)), (other := retrain(torch.where(torch.arange(N) == 4, 1, y))):
        object.__setattr__(one, "make_model", lambda seed: start)
    runs = [
        (Change(name="as it was", weights={}), 0),
        (Change(name="new", weights={}, labels={4: 1}), 0),
    ]
    found = retrain_all(again, runs, n_train=N, queries=["a", "b"], cache=tmp_path)
    torch.testing.assert_close(found[1], other(torch.ones(N), 0).double())
    assert not torch.allclose(found[0], found[1])
    # what was kept is told apart by its labels
    kept = retrain_all(again, runs[::-1], n_train=N, queries=["a", "b"], cache=tmp_path)
    torch.testing.assert_close(kept.flip(0), found)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "got a list"),
        ('{"remove": "e1"}', "by its remove"),
        ('{"relabel": [1]}', "by its relabel"),
        ('{"weights": [1]}', "by its weights"),
        ('{"weights": {"e1": "twice"}}', "weight of 'e1' must be a number; got 'twice'"),
        ('{"weights": {"e1": true}}', "weight of 'e1' must be a number; got True"),
        (
            '{"relabel": {"e1": "cat"}}',
            "new label of 'e1' must be the number of a class; got 'cat'",
        ),
    ],
)
def test_a_file_that_is_no_change_set_is_refused_by_what_is_wrong(tmp_path, content, message):
    path = tmp_path / "changes.json"
    path.write_text(content)
    with pytest.raises(ArtifactDamaged, match=message):
        ChangeSet.load(path)


@pytest.mark.parametrize(
    "content",
    [
        '{"remove": ["a", "a"]}',
        '{"weights": {"a": -1}}',
        '{"weights": {"a": 1' + "0" * 400 + "}}",
    ],
)
def test_a_file_with_changes_that_cannot_be_is_refused_by_its_name(tmp_path, content):
    (tmp_path / "mine.json").write_text(content)
    with pytest.raises(ArtifactDamaged, match=r"mine\.json is no change set"):
        ChangeSet.load(tmp_path / "mine.json")


def test_an_example_named_twice_is_found_among_very_many():
    ids = (*map(str, range(200_000)), "199999")
    with pytest.raises(ValueError, match="'199999' is named twice"):
        ChangeSet(remove=ids)
