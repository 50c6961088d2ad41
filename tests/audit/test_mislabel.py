"""The measures on runs written by hand, their combination, and what they cost."""

import math

import pytest
import torch

import headwater
from headwater.audit import (
    AUM,
    EL2N,
    IFD,
    MEASURES,
    Confidence,
    Forgetting,
    GraNd,
    IFComplexity,
    Mislabels,
    NeighbourDisagreement,
    Passes,
    Perplexity,
    Subject,
    Variability,
    combined_suspicion,
    measure_all,
    outlook,
)
from headwater.calibrate import complexity
from headwater.core.curvature import EKFAC
from headwater.core.tempering import fit_at_temperature
from headwater.trace import Influence
from tests.audit_cases import by_hand
from tests.curvature_cases import case, loss_gradients

# Outputs of three examples of two classes before training and at three checkpoints.
RUN = [
    torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]),
    torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 0.0]]),
    torch.tensor([[2.0, 0.0], [1.0, 0.0], [2.0, 0.0]]),
    torch.tensor([[3.0, 0.0], [0.0, 2.0], [1.0, 0.0]]),
]
LABELS = [0, 1, 1]


@pytest.fixture
def subject(tmp_path):
    fit, record = by_hand(tmp_path, RUN, LABELS)
    return Subject(fit, trajectories=[record])


def probabilities(k: int) -> torch.Tensor:
    return RUN[k].double().softmax(1)


def own(k: int) -> torch.Tensor:
    return probabilities(k)[range(3), LABELS]


def test_the_five_numbers_are_those_of_their_definitions():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 4, generator=generator).double()
    labels = torch.randint(4, (7,), generator=generator)
    found = outlook(logits, labels)
    for row, z, y in zip(found, logits, labels.tolist(), strict=True):
        p = z.exp() / z.exp().sum()
        others = [float(z[c]) for c in range(4) if c != y]
        error = p - torch.nn.functional.one_hot(torch.tensor(y), 4)
        margin = float(z[y]) - max(others)
        expected = [-math.log(p[y]), float(p[y]), margin, float(error.norm()), float(margin >= 0)]
        torch.testing.assert_close(row, torch.tensor(expected, dtype=torch.float64))


def test_el2n_is_that_of_the_first_checkpoint_early_and_of_more_with_a_larger_share(subject):
    def error(k: int) -> torch.Tensor:
        return (probabilities(k) - torch.nn.functional.one_hot(torch.tensor(LABELS))).norm(dim=1)

    torch.testing.assert_close(EL2N().measure(subject), error(1))
    two = EL2N(early=0.7).measure(subject)  # the first two of three steps
    torch.testing.assert_close(two, (error(1) + error(2)) / 2)


def test_grand_of_a_linear_model_is_the_error_times_the_length_of_the_input(subject):
    # The inputs are unit vectors, and the gradient is the outer product of p - y and the input.
    torch.testing.assert_close(GraNd().measure(subject), EL2N().measure(subject))


def test_grand_is_the_norm_of_autograds_gradient():
    found = case("mlp")
    fit = found.fit(EKFAC())
    subject = Subject(fit)
    subject.trajectories = [None]  # type: ignore[list-item]
    subject.kept = lambda run, share: [0]  # type: ignore[method-assign]
    subject.fit_at = lambda run, checkpoint: fit  # type: ignore[method-assign]
    torch.testing.assert_close(GraNd().measure(subject), loss_gradients(fit).norm(dim=1).double())


def test_aum_is_the_mean_margin_without_the_initial_parameters(subject):
    # Example 1 (label 1): 1 - 0, 0 - 1, 2 - 0; example 2 (label 1): -3, -2, -1.
    expected = torch.tensor([(1 + 2 + 3) / 3, (1 - 1 + 2) / 3, -2.0], dtype=torch.float64)
    torch.testing.assert_close(AUM().measure(subject), expected)


def test_cartography_is_mean_and_deviation_of_the_labels_probability(subject):
    each = torch.stack([own(k) for k in (1, 2, 3)])
    torch.testing.assert_close(Confidence().measure(subject), each.mean(0))
    deviation = (each - each.mean(0)).square().mean(0).sqrt()
    torch.testing.assert_close(Variability().measure(subject), deviation)


def test_forgetting_counts_falls_from_right_to_wrong_and_never_right_is_infinite(subject):
    assert Forgetting().measure(subject).tolist() == [0.0, 1.0, math.inf]


def test_several_runs_are_averaged(tmp_path):
    fit, record = by_hand(tmp_path / "a", RUN, LABELS)
    _, other = by_hand(tmp_path / "b", [RUN[0], *[-k for k in RUN[1:]]], LABELS)
    both = Subject(fit, trajectories=[record, other])
    torch.testing.assert_close(AUM().measure(both), torch.zeros(3, dtype=torch.float64))


def test_neighbours_of_another_label_are_counted(tmp_path):
    model = torch.nn.Linear(2, 2).double()
    x = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.2], [0.0, 1.0], [0.1, 1.0]]).double()
    data = (x, torch.tensor([0, 0, 1, 1, 1]))
    fit = headwater.fit(model, data, headwater.Classification(), curvature="ekfac")
    subject = Subject(fit, neighbours=2)
    # neighbours: 1, 2 | 0, 2 | 1, 0 | 4, 2 | 3, 2
    expected = torch.tensor([0.5, 0.5, 1.0, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(NeighbourDisagreement().measure(subject), expected)


def test_the_perplexity_of_a_text_is_exp_of_its_loss_a_token():
    found = case("lm")
    subject = Subject(found.fit(EKFAC()))
    values = Perplexity().measure(subject)
    fit = subject.fit
    for i in range(len(fit.train)):
        batch = fit.train.batch([i])
        losses = fit.task.predict(fit.model, batch).token_loss()
        scored = int((batch["labels"][:, 1:] != -100).sum())
        assert float(values[i]) == pytest.approx(math.exp(float(losses.detach().sum()) / scored))


class Topic(torch.nn.Module):
    """A language model that says the same at every position, as its first token has it."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Linear(5, 5).double()

    def forward(self, input_ids, attention_mask=None):
        first = torch.nn.functional.one_hot(input_ids[:, :1], 5).double()
        return self.table(first).expand(-1, input_ids.shape[1], -1)


class Prompted(headwater.core.examples.Examples):
    """Texts whose first tokens are a prompt."""

    def __init__(self, texts, prompts):
        self.texts, self.prompts, self.metadata = texts, prompts, {}
        self.ids = [str(i) for i in range(len(texts))]
        self.lengths = [len(t) for t in texts]

    def batch(self, indices):
        size = max(self.lengths[i] for i in indices)
        ids = torch.zeros(len(indices), size, dtype=torch.int64)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for row, i in enumerate(indices):
            n, k = self.lengths[i], self.prompts[i]
            ids[row, :n], mask[row, :n] = torch.tensor(self.texts[i]), 1
            labels[row, k:n] = ids[row, k:n]
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def fingerprint(self):
        return str((self.texts, self.prompts))


TEXTS, PROMPTS = (
    [[0, 1, 2, 3, 2], [4, 3, 3, 1], [2, 2, 0], [1, 4, 0, 0, 2], [3, 1, 4]],
    [2, 1, 2, 3, 0],
)


def prompted(model):
    torch.manual_seed(3)
    model = model()
    return headwater.fit(model, Prompted(TEXTS, PROMPTS), headwater.CausalLM(), curvature="kfac")


def test_instruction_following_difficulty_is_that_of_a_toy_model_by_hand():
    fit = prompted(Topic)
    log_p = fit.model.table(torch.eye(5).double()).log_softmax(-1).detach()
    found = IFD().measure(Subject(fit))
    for i, (text, k) in enumerate(zip(TEXTS, PROMPTS, strict=True)):
        rest = text[k + 1 :]  # of the answer all but its first token
        behind, alone = (-sum(float(log_p[topic, t]) for t in rest) for topic in (text[0], text[k]))
        assert float(found[i]) == pytest.approx(math.exp((behind - alone) / max(len(rest), 1)))
    assert float(found[2]) == 1  # a single token
    assert float(found[4]) == 1  # no prompt


def test_a_model_that_knows_no_context_has_a_difficulty_of_one():
    class Unigram(Topic):
        def forward(self, input_ids, attention_mask=None):
            return super().forward(torch.zeros_like(input_ids))

    found = IFD().measure(Subject(prompted(Unigram)))
    torch.testing.assert_close(found, torch.ones(5).double(), rtol=1e-6, atol=0)


def test_texts_without_prompts_have_no_such_difficulty():
    assert Subject(prompted(Topic)).has_prompts
    assert "prompts" in IFD().missing(Subject(case("lm").fit(EKFAC())))
    assert "prompts" in IFD().missing(Subject(case("mlp").fit(EKFAC())))
    found, _ = measure_all(Subject(prompted(Topic)))
    assert found["ifd"].passes == Passes(forward=2)


def test_the_column_of_self_influence_is_the_methods_own():
    fit = case("mlp").fit(EKFAC())
    found, _ = measure_all(Subject(fit))
    expected = Influence().self_influence(fit).double()
    torch.testing.assert_close(found["self_influence"].values, expected)


def test_the_column_of_if_comp_is_the_calibrators_code_length():
    fit = case("mlp").fit(EKFAC())
    found = IFComplexity().measure(Subject(fit))
    soft = fit_at_temperature(fit, 3.0, curvature=EKFAC(folds=1))
    torch.testing.assert_close(found, complexity(soft, fit.train).labelled())


def test_a_combination_averages_ranks_whatever_the_scales():
    a, b = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([30.0, 10.0, 20.0])
    # ranks 1 2 3 and 3 1 2
    expected = (torch.tensor([2.0, 1.5, 2.5]) - 0.5) / 3
    torch.testing.assert_close(combined_suspicion([a, b]), expected.double())
    again = combined_suspicion([a.exp(), 7 * b - 100])
    torch.testing.assert_close(again, combined_suspicion([a, b]))
    infinite = combined_suspicion([torch.tensor([0.0, 1.0, torch.inf])])
    torch.testing.assert_close(infinite, combined_suspicion([a]))
    with pytest.raises(ValueError, match="got none"):
        combined_suspicion([])


def test_passes_are_counted_once_however_many_measures_read_them(subject):
    found, missed = measure_all(subject)
    assert found["loss"].passes == found["margin"].passes == Passes(forward=1)
    assert found["aum"].passes == found["forgetting"].passes == Passes(forward=3)
    assert found["el2n"].passes == Passes(forward=1)
    assert found["grand"].passes == found["self_influence"].passes == Passes(backward=1)
    assert found["neighbours"].passes == Passes(forward=1)
    assert found["if_comp"].passes == Passes(backward=2 + 2)  # its own fit, and two classes
    assert found["laftr"].passes == Passes(forward=1, backward=1)
    # the fitted model, three checkpoints, the representations, gates; self-influence, GraNd, IF-COMP and LAFTR
    assert subject.paid == Passes(forward=6, backward=7)
    assert set(missed) == {"perplexity", "ifd", "confident_learning"}
    assert "out-of-fold" in missed["confident_learning"]


def test_an_audit_has_columns_that_users_of_cleanlab_know(subject):
    found = Mislabels(n_issues=1).of(subject)
    table = found.table()
    assert {"label_score", "is_label_issue", "given_label", "predicted_label"} <= set(table)
    assert table["given_label"] == LABELS
    assert found.issues == [2] and table["is_label_issue"] == [False, False, True]
    assert all(0 <= score <= 1 for score in table["label_score"])
    assert table["label_score"][2] == min(table["label_score"])
    assert table["predicted_label"][2] == 0
    assert found.passes == subject.paid
    assert found.facts["combined"] == ["self_influence", "aum", "neighbours"]


def test_a_language_models_audit_marks_nothing_of_itself_and_as_many_as_asked():
    fit = case("lm").fit(EKFAC())
    found = Mislabels().audit(fit)
    assert found.issues == [] and "given_label" not in found.columns
    assert found.facts["combined"] == ["self_influence", "margin"]
    assert len(Mislabels(n_issues=2).audit(fit).issues) == 2


@pytest.mark.parametrize(
    ("name", "judged"), [("mlp", "labels"), ("lm", "texts"), ("regression", "targets")]
)
def test_what_is_judged_is_called_by_its_name(name, judged):
    found = Mislabels(n_issues=2, measures=("loss",)).audit(case(name).fit(EKFAC()))
    section, held = found.section("labels"), "wrong" if judged == "labels" else "doubtful"
    assert found.judged == judged and section.title == judged.capitalize()
    told = f"2 of {len(found)} {judged} are held to be {held}: the 2 most doubtful, as asked."
    assert section.sentences[0] == told
    assert any("labels" in s for s in section.sentences) == (judged == "labels")


def test_the_reason_why_no_text_is_marked_is_a_whole_sentence():
    found = Mislabels(measures=("loss",)).audit(case("lm").fit(EKFAC()))
    assert found.facts["marked_by"].endswith("(n_issues, --issues), or verify a sample")


def test_more_issues_than_examples_are_refused(subject):
    assert len(Mislabels(n_issues=3, measures=("loss",)).of(subject).issues) == 3
    with pytest.raises(ValueError, match="at most 3 issues, one for each training example; got 4"):
        Mislabels(n_issues=4, measures=("loss",)).of(subject)


def test_without_a_run_what_needs_one_is_left_out_and_named():
    _, missed = measure_all(Subject(case("mlp").fit(EKFAC())))
    assert {"el2n", "grand", "aum", "confidence", "variability", "forgetting"} <= set(missed)
    assert all("recorded training run" in missed[name] for name in ("aum", "grand"))


def test_regression_has_a_loss_and_self_influence_alone():
    found, missed = measure_all(Subject(case("regression").fit(EKFAC())))
    assert set(found) == {"self_influence", "loss"}
    assert "margin" in missed


def test_wrong_options_are_refused_by_name(subject):
    with pytest.raises(ValueError, match="no measure 'loes'; there are: self_influence"):
        Mislabels(measures=("loes",))
    with pytest.raises(ValueError, match="'aum' is to be combined and was not measured"):
        Mislabels(measures=("loss",), combine=("aum",)).of(subject)
    with pytest.raises(ValueError, match="n_issues must be 0 or more; got -1"):
        Mislabels(n_issues=-1)
    with pytest.raises(ValueError, match="tells which labels are doubtful"):
        Mislabels(measures=("variability",)).of(subject)


def test_probabilities_of_other_examples_or_logits_are_refused(subject):
    with pytest.raises(ValueError, match=r"Expected out-of-fold probabilities \(3, 2\)"):
        Subject(subject.fit, probabilities=torch.ones(2, 2) / 2)
    with pytest.raises(ValueError, match=r"Pass softmax\(logits\)"):
        Subject(subject.fit, probabilities=torch.ones(3, 2))
    with pytest.raises(ValueError, match="one class an example"):
        Subject(case("lm").fit(EKFAC()), probabilities=torch.ones(3, 2) / 2)


def test_a_value_that_is_no_number_names_its_example(tmp_path):
    fit, _ = by_hand(tmp_path, RUN, LABELS)
    with torch.no_grad():
        fit.model.weight[0, 1] = torch.nan  # times zero it is NaN for every example
    with pytest.raises(FloatingPointError, match="'margin' of example '0' is NaN"):
        measure_all(Subject(fit), [m for m in MEASURES if m.name == "margin"])


@pytest.mark.parametrize("measure", MEASURES, ids=lambda m: m.name)
def test_every_measure_is_told_apart_by_a_name_and_cites_its_paper(measure):
    assert [m.name for m in MEASURES].count(measure.name) == 1
    assert measure.suspicious in ("high", "low", None) and type(measure).__doc__
    if measure.paper:
        assert measure.paper in headwater.core.provenance.PAPERS
        assert measure.paper in type(measure).__doc__
