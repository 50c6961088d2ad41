"""Truncation against the singular values themselves."""

import pytest
import torch

from headwater.forget import SVDTruncation
from tests.forget_cases import fitted


def test_truncation_keeps_the_greatest_singular_values():
    fit = fitted()
    edited = SVDTruncation(keep_rank=0.5).edit(fit).applied(fit.model)
    for before, after in ((fit.model[0], edited[0]), (fit.model[2], edited[2])):
        S = torch.linalg.svdvals(before.weight.detach())
        kept = torch.linalg.svdvals(after.weight.detach())
        rank = -(-len(S) // 2)
        torch.testing.assert_close(kept[:rank], S[:rank], rtol=1e-12, atol=0)
        assert float(kept[rank:].sum()) < 1e-12
    whole = SVDTruncation(keep_rank=1.0).edit(fit)
    assert all(float(d.abs().max()) == 0 for d in whole.deltas.values())
    with pytest.raises(ValueError, match="keep_rank"):
        SVDTruncation(keep_rank=0.0)
