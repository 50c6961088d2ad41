import json
from types import SimpleNamespace

import pytest
from torch import nn

from headwater.core.fit import fit
from headwater.core.plan import plan, planning
from headwater.core.task import Classification
from tests.plan_cases import images, mlp


def test_memory_that_does_not_suffice_is_refused_with_a_remedy(monkeypatch):
    monkeypatch.setattr(planning, "available_memory_bytes", lambda device=None: 10_000)
    made = plan(mlp(20, 12, 4), images(), Classification(), curvature="ekfac")
    assert not made.ok
    assert made.stages == ()
    assert "are available" in made.problems[0]
    with pytest.raises(MemoryError, match=r"fewer|follow"):
        made.require()
    json.dumps(made.to_json(), allow_nan=False)


def test_batches_are_made_smaller_where_that_is_enough(monkeypatch):
    class Wide(nn.Module):
        """Few parameters and much activation."""

        def __init__(self):
            super().__init__()
            self.low, self.head = nn.Linear(20, 20), nn.Linear(1, 4)

        def forward(self, x):
            h = self.low(x)[..., None].expand(-1, -1, 500)
            return self.head(h.tanh().sin().mean((1, 2))[:, None])

    data = images(600)
    whole = plan(Wide(), data, Classification(), curvature="ekfac", n_queries=2)
    room = (whole.peak_memory - whole.memory["held already"]) // 2
    monkeypatch.setattr(planning, "available_memory_bytes", lambda device=None: room)
    smaller = plan(Wide(), data, Classification(), curvature="ekfac", n_queries=2)
    assert smaller.ok
    assert 1 <= smaller.batch_size < whole.batch_size == 256
    assert "times as large" in smaller.notes[0]


def test_a_disk_that_does_not_suffice_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(planning, "disk_usage", lambda place: SimpleNamespace(free=100))
    made = plan(mlp(20, 4), images(), Classification(), curvature="kfac", folder=tmp_path / "run")
    assert "disk" in made.problems[0]
    assert list(tmp_path.iterdir()) == []


def test_the_disk_of_a_fit_is_predicted_from_its_shapes(tmp_path):
    model, data = mlp(20, 12, 4), images()
    for kind in ("kfac", "ekfac", "dual"):
        place = tmp_path / kind
        made = plan(model, data, Classification(), curvature=kind, folder=place)
        fit(model, data, Classification(), curvature=kind, folder=place)
        written = sum(f.stat().st_size for f in place.rglob("*") if f.is_file())
        # Headers and the manifest come on top: about 5 kB.
        assert made.disk["fit"] * 0.9 < written < made.disk["fit"] * 1.1 + 10_000
        assert "save" in {stage.name for stage in made.stages}
