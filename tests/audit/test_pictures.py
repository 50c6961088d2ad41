"""Pictures of examples: what is one, how large it is, and what black and white are."""

import pytest
import torch

import headwater
from headwater.audit import audit
from headwater.audit.pictures import SIDE, image_shape, pictures, thumbnail
from headwater.core.examples import DatasetExamples, TensorExamples
from tests.curvature_cases import case


def test_inputs_of_one_or_three_channels_are_images_and_others_are_not():
    for shape in ((1, 8, 8), (3, 4, 9)):
        assert image_shape(torch.zeros(shape)) == shape
        assert image_shape(torch.zeros(shape, dtype=torch.uint8)) == shape
    for shape in ((64,), (8, 8), (2, 8, 8), (3, 3, 8), (1, 1, 8, 8)):
        assert image_shape(torch.zeros(shape)) is None
    assert image_shape(torch.zeros(1, 8, 8, dtype=torch.int64)) is None


def test_black_and_white_are_the_least_and_greatest_value_of_each_channel_shown():
    x = torch.zeros(3, 3, 4, 4)
    x[0, 0], x[1, 0], x[2, 0] = -5.0, 5.0, 99.0
    x[0, 1, 0, 0] = torch.nan  # shown as zero
    data = TensorExamples(x, torch.zeros(3))
    found = pictures(data, [0, 1])
    assert list(found) == [0, 1]
    assert found[0][0].unique().tolist() == [0] and found[1][0].unique().tolist() == [255]
    assert found[0][1:].unique().tolist() == [0]


def test_a_large_image_is_averaged_down_and_keeps_its_proportions():
    image = torch.zeros(3, 4 * SIDE, 2 * SIDE)
    image[:, : 2 * SIDE] = 1.0
    small = thumbnail(image)
    assert small.shape == (3, SIDE, SIDE // 2)
    assert float(small[:, : SIDE // 2].min()) == 1 and float(small[:, SIDE // 2 :].max()) == 0
    assert thumbnail(torch.zeros(1, 9, 7)).shape == (1, 9, 7)


def test_vectors_are_pictures_where_their_shape_is_told():
    x = torch.arange(128.0).view(2, 64)
    data = TensorExamples(x, torch.zeros(2))
    assert pictures(data, [0, 1]) == {}
    found = pictures(data, [0, 1], (8, 8))
    assert found[0].shape == (1, 8, 8) and int(found[0][0, 0, 0]) == 0
    assert int(found[1][0, 7, 7]) == 255
    with pytest.raises(ValueError, match=r"Inputs have 64 values, and images \(8, 9\) have 72"):
        pictures(data, [0], (8, 9))
    with pytest.raises(ValueError, match="1 or 3 channels before them"):
        pictures(data, [0], (2, 4, 8))


def test_the_inputs_of_a_processor_are_found_by_their_name():
    rows = [{"pixel_values": torch.rand(3, 8, 8), "labels": torch.tensor(1)} for _ in range(2)]
    assert list(pictures(DatasetExamples(rows), [1])) == [1]
    assert pictures(DatasetExamples([{"input_ids": torch.zeros(5).long()}]), [0]) == {}


def test_an_audit_of_images_has_their_pictures_and_one_of_vectors_has_none(tmp_path):
    torch.manual_seed(0)
    x, y = torch.randn(12, 1, 4, 4), torch.arange(12) % 3
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 4), torch.nn.Flatten())
    fit = headwater.fit(model, (x, y), headwater.Classification(), curvature="ekfac")
    found = audit(fit)
    assert set(found.pictures) == set(range(12))
    found.save(tmp_path / "found")
    again = type(found).load(tmp_path / "found")
    assert all(torch.equal(again.pictures[i], p) for i, p in found.pictures.items())
    assert audit(case("mlp").fit("ekfac")).pictures == {}
