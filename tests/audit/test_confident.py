"""Confident learning beside cleanlab, and out-of-fold probabilities that have not seen their example."""

import pytest
import torch

from headwater.audit import confidently_other, label_quality, out_of_fold
from headwater.models.vision import mlp
from headwater.training.optimizers import SGD


def noisy(n: int = 200, classes: int = 4, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    logits = torch.randn(n, classes, generator=generator).double()
    logits[torch.arange(n), labels] += 1.5
    return logits.softmax(1), labels


@pytest.mark.parametrize("seed", range(3))
def test_the_confident_joint_is_cleanlabs(seed):
    count = pytest.importorskip("cleanlab.count")
    p, labels = noisy(seed=seed)
    joint, off = count.compute_confident_joint(
        labels.numpy(), p.numpy(), calibrate=False, return_indices_of_off_diagonals=True
    )
    found = confidently_other(p, labels)
    assert found.nonzero().flatten().tolist() == sorted(off) and len(off) > 0
    assert int(found.sum()) == joint.sum() - joint.trace()


def test_the_quality_is_cleanlabs_self_confidence():
    pytest.importorskip("cleanlab")
    p, labels = noisy()
    torch.testing.assert_close(label_quality(p, labels), p[torch.arange(len(p)), labels])


def test_without_cleanlab_the_extra_is_named(monkeypatch):
    import sys

    for name in [n for n in sys.modules if n.startswith("cleanlab")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cleanlab", None)
    with pytest.raises(ImportError, match=r"pip install 'headwater\[audit\]'"):
        label_quality(*noisy())


def test_a_class_that_nobody_carries_is_nobodys_label():
    p = torch.tensor([[0.1, 0.9], [0.2, 0.8]])
    assert confidently_other(p, torch.tensor([0, 0])).tolist() == [False, False]


RULE = SGD(lr=0.1, batch_size=10, epochs=3)


def test_out_of_fold_probabilities_do_not_know_their_own_label():
    x = torch.randn(23, 3, generator=torch.Generator().manual_seed(0))
    y = torch.arange(23) % 3

    def given(labels):
        return out_of_fold(lambda s: mlp([3, 3], seed=s), x, labels, optimizer=RULE, folds=4)

    p, changed = given(y), y.clone()
    changed[7] = (y[7] + 1) % 3
    other = given(changed)
    torch.testing.assert_close(other[7], p[7])
    assert not torch.allclose(other, p)  # models of the other folds have seen it
    torch.testing.assert_close(p.sum(1), torch.ones(23, dtype=torch.float64))


def test_folds_that_cannot_be_are_refused():
    x, y = torch.zeros(4, 3), torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match="folds must be from 2 to the 4 examples; got 1"):
        out_of_fold(lambda s: mlp([3, 3], seed=s), x, y, optimizer=RULE, folds=1)
