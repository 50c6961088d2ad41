"""An index that is built for one question: it gives what the unprojected method gives, example by example."""

import pytest
import torch

import headwater
from headwater.bench.built import Built
from headwater.bench.run import knob
from headwater.core.curvature import EKFAC
from headwater.core.examples import TensorExamples
from headwater.core.index import LoGra, Whitened
from headwater.core.task import Classification
from headwater.models.vision import mlp
from headwater.numerics.ranks import spearman
from headwater.trace import Influence

DAMPING = "0.1 relative"


def data(n: int, seed: int) -> TensorExamples:
    generator = torch.Generator().manual_seed(seed)
    return TensorExamples(
        torch.randn(n, 6, generator=generator), torch.randint(3, (n,), generator=generator)
    )


@pytest.fixture(scope="module")
def fit():
    train = data(50, 0)
    train.lengths = [1 + i % 7 for i in range(50)]  # so that rows lie in another order
    torch.manual_seed(0)
    task = Classification(measurement_of="margin")
    return headwater.fit(mlp((6, 5, 3)), train, task, curvature=EKFAC(fisher="exact"))


def test_all_coordinates_give_the_unprojected_scores_in_the_order_of_the_training_data(fit):
    queries = data(4, 1)
    exact = Influence(n_intervals=0, damping=DAMPING).attribute(fit, queries).values
    whole = Built(kind=Whitened(rank=None, damping=DAMPING), dtype="float32")
    found = whole.attribute(fit, queries)
    assert found.train_ids == fit.train.ids and found.kept is None
    torch.testing.assert_close(found.values, exact, rtol=1e-4, atol=1e-6)
    stored = Built(kind=whole.kind).attribute(fit, queries).values
    assert not torch.equal(stored, found.values)  # eight bits are in the answer
    assert float(spearman(stored, exact).min()) > 0.99


def test_projected_gradients_answer_for_every_example_and_tell_their_damping(fit):
    method = Built(kind=LoGra(rank=2, init="pca"))
    found = method.attribute(fit, data(4, 1))
    assert found.values.shape == (4, 50) and bool(found.values.isfinite().all())
    assert found.facts["damping"]["unit"] == "relative" and knob(method) == f"damping {DAMPING}"
