from collections import namedtuple

import pytest
import torch

from headwater.core.examples import (
    DatasetExamples,
    Subset,
    TensorExamples,
    as_examples,
    take,
    to_device,
)

Pair = namedtuple("Pair", "x y")


def tensors(n=5):
    return torch.arange(2.0 * n).view(n, 2), torch.arange(n)


def test_a_batch_holds_the_rows_asked_for():
    x, y = tensors()
    got = TensorExamples(x, y).batch([3, 0])
    assert torch.equal(got[0], x[[3, 0]]) and got[1].tolist() == [3, 0]
    listed = DatasetExamples([(x[i], int(y[i])) for i in range(5)]).batch([3, 0])
    assert torch.equal(listed[0], x[[3, 0]]) and listed[1].tolist() == [3, 0]


def test_a_subset_keeps_ids_lengths_and_metadata():
    data = DatasetExamples(
        list(range(4)), ids=list("abcd"), lengths=[5, 6, 7, 8], metadata={"who": [1, 2, 3, 4]}
    )
    some = data.subset([2, 0])
    assert isinstance(some, Subset) and len(some) == 2
    assert (some.ids, some.lengths, some.metadata) == (["c", "a"], [7, 5], {"who": [3, 1]})
    assert some.batch([0]).tolist() == [2]
    assert torch.equal(some.keys, data.keys[[2, 0]])  # draws are tied to ids
    assert some.fingerprint() != data.subset([0, 2]).fingerprint()
    assert some.subset([1]).ids == ["a"]


def test_fingerprints_tell_contents_apart():
    x, y = tensors()
    assert TensorExamples(x, y).fingerprint() == TensorExamples(x.clone(), y).fingerprint()
    assert TensorExamples(x, y).fingerprint() != TensorExamples(x + 1, y).fingerprint()
    rows = [{"text": "one", "x": x[0], "n": 1}, {"text": "two", "x": x[1], "n": 2}]
    changed = [rows[0], rows[1] | {"text": "tow"}]
    assert DatasetExamples(rows).fingerprint() == DatasetExamples(list(rows)).fingerprint()
    assert DatasetExamples(rows).fingerprint() != DatasetExamples(changed).fingerprint()
    named = DatasetExamples(rows, name="mine").fingerprint()
    assert named == DatasetExamples(changed, name="mine").fingerprint()


def test_a_dataset_without_readable_content_wants_a_name():
    with pytest.raises(TypeError, match=r"object objects.*name=") as caught:
        DatasetExamples([object()]).fingerprint()
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x, y: TensorExamples(x, y[:3]), "share their first axis"),
        (lambda x, y: TensorExamples(), "share their first axis"),
        (lambda x, y: TensorExamples(x, ids=["a"]), "Expected 5 ids, one for each example; got 1"),
        (lambda x, y: TensorExamples(x, ids=list("abcab")), "'a' occurs more than once"),
        (lambda x, y: TensorExamples(x[:0]), "dataset is empty"),
        (lambda x, y: TensorExamples(x, metadata={"m": [1]}), "'m' has 1 values for 5 examples"),
        (lambda x, y: TensorExamples(x).subset([1, 1]), "'1' occurs more than once"),
    ],
)
def test_what_does_not_fit_together_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(*tensors())


def test_examples_are_made_of_what_people_have():
    x, y = tensors()
    examples = TensorExamples(x, y)
    assert as_examples(examples) is examples
    assert isinstance(as_examples((x, y)), TensorExamples)
    assert isinstance(as_examples([(x[0], 1), (x[1], 0)]), DatasetExamples)
    with pytest.raises(TypeError, match=r"got generator.*DatasetExamples"):
        as_examples(i for i in range(3))


def test_rows_are_taken_through_nested_batches():
    x, y = tensors()
    batch = {
        "pair": Pair(x, y),
        "list": [x, (y,)],
        "text": list("abcde"),
        "scale": 2.0,
        "none": None,
    }
    got = take(batch, torch.tensor([4, 1]))
    assert isinstance(got["pair"], Pair) and got["pair"].y.tolist() == [4, 1]
    assert torch.equal(got["list"][0], x[[4, 1]]) and isinstance(got["list"][1], tuple)
    assert got["text"] == ["e", "b"]
    assert got["scale"] == 2.0 and got["none"] is None


def test_a_batch_on_a_device_has_no_history():
    x, _ = tensors()
    moved = to_device({"x": (x * x.clone().requires_grad_()), "text": ["a"]}, torch.device("cpu"))
    assert not moved["x"].requires_grad and moved["text"] == ["a"]
