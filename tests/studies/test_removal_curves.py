import pytest
import torch

from headwater.core.scores import Scores
from headwater.trace.measures import query_loss_difference, removal
from headwater.training.loop import example_losses
from studies.removal_curves import Losses, rows
from tests.training.test_retraining import ALWAYS, stacked, table


def test_losses_out_of_margins_are_those_of_retraining_for_the_loss(tmp_path):
    weights = torch.ones(3, 30).index_fill(1, torch.tensor([2, 5]), 0.0)
    losses = Losses(stacked(), list("abcd"), tmp_path)
    torch.testing.assert_close(
        losses.many(weights, [0, 1, 2]), stacked(measure=example_losses).many(weights, [0, 1, 2])
    )
    assert len(list(tmp_path.rglob("*.json"))) == 3  # kept as margins, which removal reads too


def test_the_tables_have_a_row_a_method_and_a_column_a_count():
    scores = table()
    assert isinstance(scores, Scores)
    curves = removal(stacked(), scores, [1, 3], **ALWAYS)
    difference = query_loss_difference(stacked(measure=example_losses), scores)
    lines = rows({"one": (curves, difference), "two": (curves, difference)})
    assert lines[0] == "| method | k = 1 | k = 3 |"
    flips, moves = lines[:4], lines[5:]
    assert [line.count("|") for line in flips] == [4] * 4
    assert [line.count("|") for line in moves] == [5] * 4
    first = float(moves[2].split("|")[2].split()[0])
    assert first == pytest.approx(float(curves.change[0].mean()), abs=0.006)
