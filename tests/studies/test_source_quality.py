import pytest
import torch

from studies.source_quality import difference, outcomes_of, scores_of, workloads

pytest.importorskip("mlxtend")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "least"), [("stopped early", 0.02), ("two stages", 0.15)])
def test_source_is_above_ekfac_influence_where_training_did_not_converge(name, least, tmp_path):
    """The claim of the paper, at a small scale: one model, 40 halves of 600 digits, 3 retrainings each."""
    torch.set_num_threads(1)
    workload = workloads(None, n=600, n_query=60, n_subsets=40)[name]
    truth = outcomes_of(workload, tmp_path, repeats=3).mean(1)
    rival, ours = "EK-FAC, weight decay", "SOURCE, L = 3"
    found, _ = scores_of(workload, tmp_path, 1, [rival, ours])
    gap = difference(found[ours], found[rival], workload.masks, truth)
    assert gap.low > 0 and gap.value > least, gap
