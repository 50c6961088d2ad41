"""Damping in its units, what a person may write, and the evidence against its brute-force maximum."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headwater.core.damping import Damping, Inverse, evidence, mean_of, parse_damping


@pytest.mark.parametrize("value", [0.0, -0.1, math.inf, math.nan])
def test_a_damping_must_be_positive_and_finite(value):
    with pytest.raises(ValueError, match=f"positive and finite; got {value}.*weight decay"):
        Damping(value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (0.01, Damping(0.01)),
        ("0.01", Damping(0.01)),
        ("1e-3 absolute", Damping(1e-3)),
        ("0.1 relative", Damping(0.1, "relative")),
        (Damping(2.0), Damping(2.0)),
        ("auto", "auto"),
        ("weight_decay", "weight_decay"),
        ("evidence", "evidence"),
    ],
)
def test_what_a_person_writes(text, expected):
    assert parse_damping(text) == expected


@pytest.mark.parametrize("text", ["", "much", "-1", "0.1 percent", "0.1 relative please", "nan"])
def test_other_words_are_refused_with_examples(text):
    with pytest.raises(ValueError, match=r"such as 0.01, '0.1 relative', 'weight_decay'"):
        parse_damping(text)


def test_relative_damping_is_taken_of_the_mean():
    eigenvalues = torch.tensor([1.0, 3.0])
    assert mean_of(eigenvalues) == 2 and mean_of(torch.zeros(0)) == 0
    factor = Inverse(Damping(0.5, "relative"))(eigenvalues, 2.0)
    torch.testing.assert_close(factor, torch.tensor([1 / 2, 1 / 4]))
    assert bool(Inverse(Damping(0.1, "relative"))(torch.zeros(2), 0.0).isfinite().all())


@given(
    spectrum=st.lists(st.floats(-6, 2), min_size=1, max_size=30),
    n=st.integers(1, 10_000),
    distance=st.floats(-4, 4),
)
def test_the_evidence_is_the_maximum_of_laplaces_log_evidence(spectrum, n, distance):
    r"""log p(D) = const - n ρ |θ|² / 2 + ½ Σ log(ρ / (λ + ρ)), by golden section over log ρ."""
    eigenvalues, distance = torch.tensor(spectrum).double().mul(math.log(10)).exp(), 10**distance

    def log_evidence(log_rho: float) -> float:
        rho = math.exp(log_rho)
        return -n * rho * distance / 2 - 0.5 * float(torch.log1p(eigenvalues / rho).sum())

    low, high, ratio = -80.0, 40.0, (math.sqrt(5) - 1) / 2
    for _ in range(120):
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, b) if log_evidence(a) > log_evidence(b) else (a, high)
    found = evidence([eigenvalues[:1], eigenvalues[1:]], n=n, distance=distance)
    # a maximum is flat: the search knows it to about the root of the rounding of its values
    values = [log_evidence(math.log(found)), log_evidence((low + high) / 2)]
    assert values[0] >= values[1] - 1e-9 * abs(values[1])
    determined = float((eigenvalues / (eigenvalues + found)).sum())
    assert found == pytest.approx(determined / (n * distance), rel=1e-9)  # MacKay's fixed point


@pytest.mark.parametrize(("mean", "distance"), [(0.0, 1.0), (1.0, 0.0)])
def test_nothing_to_choose_by_is_said(mean, distance):
    with pytest.raises(ValueError, match="Pass a number instead"):
        evidence([torch.full((3,), mean)], n=10, distance=distance)
