import torch

from headwater.core.curvature.choice import dual_rows
from headwater.core.task import Classification, FunctionTask
from tests.plan_cases import followed, images, mlp


def test_rows_of_the_dual_form_are_counted_on_a_sample():
    model, data, task = mlp(20, 4), images(100), Classification()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.zero_()
    # Four equally likely classes: every label is kept.
    assert dual_rows(followed(model, data, task), data, cut=1e-3) == 400
    only_loss = FunctionTask(loss_with=task.loss)
    assert dual_rows(followed(model, data, only_loss), data, cut=1e-3) is None
