r"""Claims with error control: "these 137 are wrong, with 95 % confidence at most 5 of them are false claims".

Some examples are suspected: of wrong labels, of leaks, of being memorized. Each has a score. A person looks at a few,
*drawn at random*, and says of each whether it is what it is suspected of. That alone, and no property of the score,
bounds the false claims among the examples that nobody looked at.

Two promises can be had, and the one that is wanted is chosen before the verified examples are looked at:

- `eta`: more than eta false claims with probability at most alpha. Selection with error control of Lee, Tchetgen
  Tchetgen and Dobriban (2024), "Batch Predictive Inference", arXiv:2409.13990: with the score of every verified example
  that is right, and minus infinity for one that is wrong, claim what is above the bound on the (m - eta)-th smallest of
  a batch.
- `share`: more than this share of false claims with probability at most alpha. How many claims there are depends on
  the threshold, and the threshold on them; so false claims are bounded at all thresholds at once
  (`numerics.false_claims`), and the longest list whose bound is within the share is taken. The same bounds hold for
  every other list (`claim_curve`), because a claim added to a list adds at most one false one: Blanchard, Neuvial and
  Roquain (2020), "Post Hoc Confidence Bounds on False Positives Using Reference Families", arXiv:1703.02307.

The only randomness needed is that of the draw: scores may come from a model that was trained on all these examples, as
long as no verified outcome had a part in them.
"""

import math
import warnings
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headwater.numerics.batch_ranks import check_sizes, decimal, rank_cdf, rank_quantile, reaches
from headwater.numerics.false_claims import simultaneous_caps
from headwater.numerics.ranks import average_ranks

Suspicious = Literal["high", "low"]

_NOT_RANDOM = 1e-4  # a draw this improbable was no random draw
_DRAW = 0x64726177  # tells this stream from others with the same seed


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Examples that are claimed to be wrong, and what is promised of them.

    Attributes:
        threshold: Scores beyond it, and not at it, are claimed.
        selected: Claimed, (example,); never a verified one.
        scores: The scores.
        verified: Numbers of the examples that were verified.
        wrong: Which of those are wrong.
        eta: Number of false claims that was allowed, or None.
        share: Share of false claims that was allowed, or None.
        alpha: Probability of more than that.
        false_at_most: With probability 1 - alpha or more no more of the claims are false.
        exact_level: Probability, over draws, of more than eta false claims if no scores are tied; for a share, that any
            bound on a list fails. No more than alpha.
        suspicious: Which end of the scores is suspicious.
        draw_p_value: How probable verified scores as unlike the others would be in a random draw.
        reason: Why nothing is claimed.
    """

    papers: ClassVar[tuple[str, ...]] = ("arXiv:2409.13990", "arXiv:2310.18108", "arXiv:1703.02307")

    threshold: float
    selected: Bool[Tensor, " example"]
    scores: Float[Tensor, " example"]
    verified: Int[Tensor, " verified"]
    wrong: Bool[Tensor, " verified"]
    eta: int | None
    share: float | None
    alpha: float
    false_at_most: int
    exact_level: float
    suspicious: Suspicious
    draw_p_value: float
    reason: str = ""

    def __len__(self) -> int:
        return int(self.selected.sum())

    @property
    def facts(self) -> dict[str, Any]:
        """What was promised on which evidence; passes over data beyond the scores: none."""
        return {
            "papers": list(self.papers),
            "eta": self.eta,
            "share": self.share,
            "alpha": self.alpha,
            "exact_level": self.exact_level,
            "threshold": self.threshold if math.isfinite(self.threshold) else None,
            "suspicious": self.suspicious,
            "claims": len(self),
            "false_at_most": self.false_at_most,
            "examples": len(self.scores),
            "verified": len(self.verified),
            "verified_wrong": int(self.wrong.sum()),
            "draw_p_value": self.draw_p_value,
            "passes_beyond_the_fit": 0,
        }

    @property
    def sentence(self) -> str:
        """The promise in a sentence or two."""
        n, total, found = len(self.verified), len(self.scores), int(self.wrong.sum())
        seen = f"{n:,} of {total:,} examples were verified; {found:,} of them {_are(found)} wrong."
        if self.reason:
            return f"No further example is claimed to be wrong: {self.reason}. {seen}"
        confidence = f"with {_confidence(self.alpha)} confidence"
        most, claims = self.false_at_most, len(self)
        if most == claims:
            are = "1 example is" if claims == 1 else f"{claims:,} examples are"
            unsaid = f"{confidence} no more can be said than that all may be right"
            return f"{are} beyond the threshold, and {unsaid}. {seen}"
        if self.share is None:
            promise = f"at most {most:,} of them {_are(most)} false claims"
        else:
            limit = _most(self.share)
            promise = f"at most {limit} of them are false claims ({most:,} at most)"
        if claims == 1:
            opening = "This 1 example is wrong"
        else:
            opening = f"These {claims:,} examples are wrong"
        return f"{opening}; {confidence} {promise}. {seen}"

    def table(self) -> dict[str, list]:
        """Columns with a row for each example: score, selected, verified, wrong (None where not verified)."""
        looked_at = torch.zeros(len(self.scores), dtype=torch.bool)
        looked_at[self.verified] = True
        outcomes: list[bool | None] = [None] * len(self.scores)
        for i, outcome in zip(self.verified.tolist(), self.wrong.tolist(), strict=True):
            outcomes[i] = outcome
        return {
            "score": self.scores.tolist(),
            "selected": self.selected.tolist(),
            "verified": looked_at.tolist(),
            "wrong": outcomes,
        }

    def __repr__(self) -> str:
        return f"Selection({self.sentence})"


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


_DIGITS = 8  # behind the point of a percentage


def _confidence(alpha: float) -> str:
    """1 - alpha in per cent, never rounded up: no alpha is a confidence of 100 %."""
    exact = 100 * (1 - decimal(alpha))
    below = math.floor(exact * 10**_DIGITS)
    more = "" if below == exact * 10**_DIGITS else "more than "
    return f"{more}{_digits(below)} %"


def _most(share: float) -> str:
    """A share that is not passed in per cent, never rounded down."""
    return f"{_digits(math.ceil(100 * decimal(share) * 10**_DIGITS))} %"


def _digits(scaled: int) -> str:
    whole, rest = divmod(scaled, 10**_DIGITS)
    return f"{whole}.{rest:0{_DIGITS}}".rstrip("0").rstrip(".")


@dataclass(frozen=True, kw_only=True)
class ClaimCurve:
    """Bounds on the false claims of every list of claims, which all hold together.

    Attributes:
        thresholds: Scores of the verified examples that are right, most suspicious first.
        claims: How many unverified examples are beyond each.
        false_at_most: How many of those may be false claims.
        level: Probability that any of these bounds fails.
        alpha: What was asked for.
        scores: The scores of all examples.
        verified: Numbers of the examples that were verified.
        wrong: Which of those are wrong.
        suspicious: Which end of the scores is suspicious.
        draw_p_value: How probable verified scores as unlike the others would be in a random draw.
    """

    thresholds: Float[Tensor, " threshold"]
    claims: Int[Tensor, " threshold"]
    false_at_most: Int[Tensor, " threshold"]
    level: float
    alpha: float
    scores: Float[Tensor, " example"]
    verified: Int[Tensor, " verified"]
    wrong: Bool[Tensor, " verified"]
    suspicious: Suspicious
    draw_p_value: float

    def bound(self, selected: Bool[Tensor, " example"]) -> int:
        """At most so many of these unverified examples are right, whichever way they were chosen.

        The claims beyond a threshold, which the curve bounds, and every other claim in full; at the best threshold.
        Verified examples among them are left out: of those one knows.
        """
        asked = selected.clone()
        asked[self.verified] = False
        own = _signed(self.scores[asked].double(), self.suspicious)
        limits = _signed(self.thresholds, self.suspicious)
        bounds = self.false_at_most + torch.searchsorted(own.sort().values, limits, right=True)
        return min(int(asked.sum()), *bounds.tolist())

    def select(self, share: float) -> Selection:
        """The longest list of the most suspicious examples with at most this share of false claims."""
        _check_share(share)
        signed = _signed(self.scores, self.suspicious)
        candidates = _unverified(len(signed), self.verified)
        ordered = signed[candidates].sort(descending=True).values
        m = len(ordered)
        length = torch.arange(1, m + 1)
        # The first threshold that a list reaches bounds all of it; beyond the others what is left counts in full.
        first = torch.searchsorted(self.claims, length)
        spared = torch.cat([length.new_zeros(1), self.false_at_most - self.claims]).cummin(0).values
        inside = torch.cat([self.false_at_most, length.new_tensor([m])])
        bounds = inside[first].minimum(length + spared[first])
        # A list ends where the score changes: equal scores are claimed together or not at all.
        below = torch.cat([ordered[1:], ordered.new_tensor([-math.inf])])
        allowed = (bounds <= share * length + 1e-9) & (below < ordered)
        places = allowed.nonzero().squeeze(1)
        reason, threshold, most = "", math.inf, 0
        if len(places):
            k = int(places[-1])
            threshold, most = float(below[k]), int(bounds[k])
        else:
            reason = (
                f"no list of the most suspicious has at most {_most(share)} false claims with "
                f"{_confidence(self.alpha)} confidence; verify more, or draw from fewer and more suspicious "
                "examples, or allow a larger share"
            )
        selected = candidates & (signed > threshold)
        return Selection(
            threshold=threshold if self.suspicious == "high" else -threshold,
            selected=selected,
            scores=self.scores,
            verified=self.verified,
            wrong=self.wrong,
            eta=None,
            share=share,
            alpha=self.alpha,
            false_at_most=most,
            exact_level=self.level,
            suspicious=self.suspicious,
            draw_p_value=self.draw_p_value,
            reason=reason,
        )

    def table(self) -> dict[str, list]:
        """Columns with one row for each threshold."""
        return {
            "threshold": self.thresholds.tolist(),
            "claims": self.claims.tolist(),
            "false_at_most": self.false_at_most.tolist(),
        }

    def __repr__(self) -> str:
        total, n = len(self.scores), len(self.verified)
        confidence = _confidence(self.alpha)
        return (
            f"ClaimCurve({len(self.thresholds)} thresholds, together at {confidence} confidence; {n:,} of {total:,} "
            "verified)"
        )


def select(
    scores: Float[Tensor, " example"],
    verified: Int[Tensor, " verified"],
    wrong: Bool[Tensor, " verified"],
    *,
    eta: int | None = None,
    share: float | None = None,
    alpha: float = 0.05,
    suspicious: Suspicious = "high",
) -> Selection:
    """Claim unverified examples to be wrong, with a bound on the false claims.

    Args:
        scores: A score of every example.
        verified: Numbers of the examples that were looked at, drawn at random from all of them (`draw_sample`).
        wrong: What was found.
        eta: Most false claims that there may be.
        share: Most of the claims that may be false, as a share of them.
        alpha: Probability of more: 0.05 is 95 % confidence.
        suspicious: "high" where large scores are suspicious, as influence on oneself is; "low" for a quality such as a
            label score.

    Returns:
        The claims with their promise; `.sentence` says it. Where nothing can be claimed, it says why.

    Raises:
        ValueError: Nothing is verified or nothing else is there, scores are NaN, or not one of eta and share is given.

    Warns:
        When scores of the verified examples are so unlike the others' that they were hardly drawn at random.

    Example:
        >>> scores = torch.cat([torch.zeros(150), torch.ones(50)]) + torch.linspace(0, 0.5, 200)
        >>> verified = draw_sample(200, 80, seed=1)
        >>> print(select(scores, verified, verified >= 150, eta=5).sentence)
        These 29 examples are wrong; with 95 % confidence at most 5 of them are false claims. ...
    """
    if (eta is None) == (share is None):
        raise ValueError(
            f"Give eta, a number of false claims, or share, a share of them; got eta {eta} and share {share}."
        )
    if share is not None:
        _check_share(share)
        most = math.floor(decimal(share) * (len(scores) - len(verified)))
        curve = claim_curve(scores, verified, wrong, alpha=alpha, suspicious=suspicious, most=most)
        return curve.select(share)
    assert eta is not None
    signed, right, p_value = _checked(scores, verified, wrong, alpha, suspicious)
    n, m = len(verified), len(scores) - len(verified)
    if not 0 <= eta < m:
        raise ValueError(f"eta must be 0 or more and below {m}, the unverified; got {eta}.")
    q, coverage = rank_quantile(n, m, m - eta, alpha)
    threshold = float(right[n - q]) if q <= n else math.inf
    selected = _unverified(len(signed), verified) & (signed > threshold)
    reason = ""
    if q > n:
        least = _fewest(len(scores), eta, alpha)
        reason = (
            f"at most {eta:,} false {'claim' if eta == 1 else 'claims'} with {_confidence(alpha)} confidence "
            f"takes {least:,} or more verified examples of {len(scores):,}"
        )
    elif not selected.any():
        reason = "no score is beyond those of the verified examples that are right"
    return Selection(
        threshold=threshold if suspicious == "high" else -threshold,
        selected=selected,
        scores=scores.detach().cpu(),
        verified=verified.cpu(),
        wrong=wrong.cpu(),
        eta=eta,
        share=None,
        alpha=alpha,
        false_at_most=min(eta, int(selected.sum())),
        exact_level=1 - float(coverage),
        suspicious=suspicious,
        draw_p_value=p_value,
        reason=reason,
    )


def claim_curve(
    scores: Float[Tensor, " example"],
    verified: Int[Tensor, " verified"],
    wrong: Bool[Tensor, " verified"],
    *,
    alpha: float = 0.05,
    suspicious: Suspicious = "high",
    most: int | None = None,
) -> ClaimCurve:
    """Bound the false claims of all lists at once, so that a list may be chosen after looking.

    Args:
        scores: A score of every example.
        verified: Numbers of the examples that were looked at, drawn at random from all of them.
        wrong: What was found.
        alpha: Probability that any bound fails.
        suspicious: Which end of the scores is suspicious.
        most: Leave out thresholds at which more claims than these could be false. Chosen beforehand, it lowers the
            bounds of the others.

    Example:
        >>> scores = torch.cat([torch.zeros(150), torch.ones(50)]) + torch.linspace(0, 0.5, 200)
        >>> verified = draw_sample(200, 80, seed=1)
        >>> curve = claim_curve(scores, verified, verified >= 150)
        >>> curve.bound(scores > 1)  # of 29 claims
        6
    """
    signed, right, p_value = _checked(scores, verified, wrong, alpha, suspicious)
    n, m = len(verified), len(scores) - len(verified)
    caps = simultaneous_caps(n, m, alpha, most=most)
    thresholds = right[: len(caps.caps)]
    ordered = signed[_unverified(len(signed), verified)].sort().values
    return ClaimCurve(
        thresholds=thresholds if suspicious == "high" else -thresholds,
        claims=m - torch.searchsorted(ordered, thresholds, right=True),
        false_at_most=caps.caps,
        level=caps.level,
        alpha=alpha,
        scores=scores.detach().cpu(),
        verified=verified.cpu(),
        wrong=wrong.cpu(),
        suspicious=suspicious,
        draw_p_value=p_value,
    )


def draw_sample(n_examples: int, n: int, *, seed: int = 0) -> Int[Tensor, " n"]:
    """Numbers of n examples to verify, drawn at random without replacement.

    Example:
        >>> sorted(draw_sample(5, 5).tolist())
        [0, 1, 2, 3, 4]
    """
    if not 1 <= n <= n_examples:
        raise ValueError(f"Expected 1 to {n_examples} examples to draw; got {n}.")
    if seed < 0:
        raise ValueError(f"Expected a seed of 0 or more; got {seed}.")
    # A stream of its own: torch's would shuffle as whoever else was seeded with the same number did.
    stream = np.random.default_rng([seed, n_examples, _DRAW])
    return torch.from_numpy(stream.permutation(n_examples)[:n])


def _check_share(share: float) -> None:
    if not 0 < share < 1:
        raise ValueError(f"share must lie between 0 and 1; got {share}. 0.1 is 10 %.")


def _signed(scores: Float[Tensor, " some"], suspicious: Suspicious) -> Float[Tensor, " some"]:
    """Scores of which large ones are suspicious."""
    return scores if suspicious == "high" else -scores


def _unverified(n_examples: int, verified: Int[Tensor, " verified"]) -> Bool[Tensor, " example"]:
    return torch.ones(n_examples, dtype=torch.bool).index_fill(0, verified.cpu(), False)


def _checked(
    scores: Float[Tensor, " example"],
    verified: Int[Tensor, " verified"],
    wrong: Bool[Tensor, " verified"],
    alpha: float,
    suspicious: Suspicious,
) -> tuple[Tensor, Tensor, float]:
    """Scores of which large ones are suspicious; those of the verified that are right, sorted; the draw's probability.

    The second are as many as are verified, from large to small, with minus infinity for those that are wrong.
    """
    if len(verified) != len(wrong):
        raise ValueError(
            f"Expected an outcome for each of {len(verified)} verified examples; got {len(wrong)}."
        )
    scores, verified, wrong = scores.detach().cpu(), verified.cpu(), wrong.cpu()
    check_sizes(len(verified), len(scores) - len(verified), alpha)
    if suspicious not in ("high", "low"):
        raise ValueError(f"suspicious must be 'high' or 'low'; got {suspicious!r}.")
    if scores.isnan().any():
        raise ValueError(
            f"{int(scores.isnan().sum())} of {len(scores)} scores are NaN; leave those examples out."
        )
    if len(verified.unique()) < len(verified):
        raise ValueError("An example was verified twice; name each once.")
    if int(verified.min()) < 0 or int(verified.max()) >= len(scores):
        raise ValueError(
            f"Verified examples must be numbers from 0 to {len(scores) - 1}; got "
            f"{int(verified.min())} to {int(verified.max())}."
        )
    signed = _signed(scores.double(), suspicious)
    p_value = _draw_p_value(signed, verified)
    if p_value < _NOT_RANDOM:
        warnings.warn(
            f"Scores of the verified examples are unlike the others' (p = {p_value:.0e} for a random draw). The "
            "promise holds only if they were drawn at random, and not for their scores.",
            stacklevel=3,
        )
    right = signed[verified].masked_fill(wrong, -math.inf).sort(descending=True).values
    return signed, right, p_value


def _draw_p_value(scores: Float[Tensor, " example"], verified: Int[Tensor, " verified"]) -> float:
    """Two-sided, of the sum of ranks under random draws without replacement, by the normal distribution."""
    ranks, n = average_ranks(scores), len(verified)
    variance = float(ranks.var(correction=0)) * n * (len(ranks) - n) / (len(ranks) - 1)
    if variance == 0:
        return 1.0
    z = float(ranks[verified].sum() - n * ranks.mean()) / math.sqrt(variance)
    return 2 * NormalDist().cdf(-abs(z))


def _fewest(total: int, eta: int, alpha: float) -> int:
    """How many of all examples must be verified before any threshold is finite."""
    low, high = 1, total - eta - 1
    while low < high:
        n = (low + high) // 2
        m = total - n
        if reaches(rank_cdf(n, m, m - eta, n), alpha):
            high = n
        else:
            low = n + 1
    return high
