"""Live rows equal gradients of single examples at the parameters of their step, and survive what happens to a run."""

import random
import signal
import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from headwater.core.capture import LayerError
from headwater.core.curvature import EKFAC
from headwater.core.examples import DatasetExamples, TensorExamples
from headwater.core.files import ArtifactError, ArtifactMismatch, FolderBusy
from headwater.core.fit import fit
from headwater.core.index import GradientIndex, LiveIndex, LoGra, Whitened
from headwater.core.task import CausalLM, Classification
from headwater.models.gpt import GPT
from tests import live_runs
from tests.curvature_cases import autograd_rows
from tests.forks import forking

KIND = LoGra(rank=3, damping=0.1)
TASK = Classification()
N = 24


def classifier(n=N):
    """A fit of a small network, made before training, and its data."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    ids = [f"e{i}" for i in range(n)]
    metadata = {"source": ["web" if i % 3 else "book" for i in range(n)]}
    x, y = torch.randn(n, 6, dtype=torch.float64), torch.randint(3, (n,))
    data = TensorExamples(x, y, ids=ids, metadata=metadata)
    return fit(model, data, TASK, curvature="identity"), data


def language(n=8):
    """The same of a tied decoder over sequences of several lengths, padded on the right."""
    model = GPT(11, context=8, n_layers=1, dim=8, n_heads=2).double()
    rows = [torch.randint(1, 11, (3 + i % 5,)) for i in range(n)]

    def collate(some):
        long = max(map(len, some))
        ids = torch.stack([F.pad(t, (0, long - len(t))) for t in some])
        real = torch.stack([F.pad(torch.ones_like(t), (0, long - len(t))) for t in some])
        return {
            "input_ids": ids,
            "attention_mask": real,
            "labels": ids.masked_fill(real == 0, -100),
        }

    names = [f"t{i}" for i in range(n)]
    data = DatasetExamples(rows, collate=collate, ids=names, lengths=[len(r) for r in rows])
    return fit(model, data, CausalLM(), curvature="identity"), data


def truth(fitted, space, data, index):
    """Projected gradients of each example's own loss at the model's parameters, by autograd."""
    whole = autograd_rows(fitted, fitted.task.loss, data.subset(index.tolist()))
    parts = []
    for layer in fitted.followed:
        G = whole[layer.name].unflatten(1, layer.block)
        P_out, P_in = (None if p is None else p.double() for p in space.projection.sides(layer))
        G = G if P_out is None else P_out @ G
        parts.append((G if P_in is None else G @ P_in.mT).flatten(1))
    return torch.cat(parts, 1)


def _mean(step, losses, batch):
    return losses.mean()


def _sum(step, losses, batch):
    step.normalizer = 1
    return losses.sum()


def _tokens(step, losses, batch):
    scored = (batch["labels"][:, 1:] != -100).sum()
    step.normalizer = float(scored)
    return losses.sum() / scored


def _mean_of_means(step, losses, batch):
    lengths = (batch["labels"][:, 1:] != -100).sum(1)
    step.normalizer = lengths * len(lengths)
    return (losses / lengths).mean()


def _seen(step, losses, batch):
    step.follow(losses)
    return 1024 * (losses * torch.arange(1, len(losses) + 1)).mean() / 3


REDUCTIONS = (_mean, _sum, _tokens, _mean_of_means, _seen)


@pytest.mark.parametrize("make", [classifier, language])
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_rows_are_gradients_of_single_examples_at_their_step(tmp_path, make, reduce):
    fitted, data = make()
    if make is classifier and reduce in (_tokens, _mean_of_means):
        pytest.skip("has no tokens")
    model, task = fitted.model, fitted.task
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    made, index = {}, torch.randperm(len(data)).split(3)
    with LiveIndex(fitted, tmp_path, kind=KIND, optimizer=optimizer, dtype="float32") as live:
        for number, some in enumerate(index):
            expected, batch = truth(fitted, live.space, data, some), data.batch(some.tolist())
            optimizer.zero_grad()
            with live.step([data.ids[i] for i in some]) as step:
                reduce(step, task.loss(model, batch), batch).backward()
            torch.testing.assert_close(step.rows, expected, rtol=1e-10, atol=1e-10)
            made |= {data.ids[i]: (number, row) for i, row in zip(some, expected, strict=True)}
            optimizer.step()
    positions = live.index.positions_of(data.ids)
    rows = torch.stack([made[name][1] for name in data.ids]).float()
    assert torch.equal(live.index.rows(positions), rows) or torch.allclose(
        live.index.rows(positions), rows, rtol=1e-6, atol=1e-6
    )
    assert live.index.metadata(positions)["step"] == [made[name][0] for name in data.ids]
    assert live.index.numbers(positions) == list(range(len(data)))
    assert GradientIndex.verify(tmp_path) == []


def test_gradient_accumulation_makes_several_passes_a_step(tmp_path):
    fitted, data = classifier()
    optimizer = torch.optim.SGD(fitted.model.parameters(), lr=0.5)
    with LiveIndex(fitted, tmp_path, kind=KIND, optimizer=optimizer) as live:
        for some in torch.arange(N).split(8):
            optimizer.zero_grad()
            for part in some.split(3):
                expected = truth(fitted, live.space, data, part)
                with live.step(part, normalizer=8) as step:
                    (TASK.loss(fitted.model, data.batch(part.tolist())).sum() / 8).backward()
                torch.testing.assert_close(step.rows, expected, rtol=1e-10, atol=1e-10)
            optimizer.step()
    steps = live.index.metadata(live.index.positions_of(data.ids))["step"]
    assert steps == [i // 8 for i in range(N)]


@pytest.mark.parametrize("make", [classifier, language])
@pytest.mark.parametrize(
    "kind", [KIND, Whitened(rank=3, sides="random"), Whitened(sides="leading")]
)
def test_without_learning_it_is_the_index_that_is_built_afterwards(tmp_path, make, kind):
    fitted, data = make()
    if isinstance(kind, Whitened):
        fitted = fit(fitted.model, data, fitted.task, curvature=EKFAC(folds=1))
    with LiveIndex(fitted, tmp_path / "live", kind=kind, dtype="float32") as live:
        for some in torch.randperm(len(data)).split(5):
            with live.step(some) as step:
                losses = fitted.task.loss(fitted.model, data.batch(some.tolist()))
                step.follow(losses)
                losses.mean().backward()
    built = GradientIndex.build(fitted, tmp_path / "built", kind=kind, dtype="float32", sample=0)
    ours, theirs = (i.rows(i.positions_of(data.ids)) for i in (live.index, built))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    queries = data.subset(range(3))
    ours, theirs = (
        i.attribute(f, queries, keep=len(data))
        for i, f in ((live.index, live.fit), (built, fitted))
    )
    order = [ours.train_ids.index(name) for name in theirs.train_ids]
    torch.testing.assert_close(ours.values[:, order], theirs.values, rtol=1e-4, atol=1e-6)


def trained(fitted, data, folder, *, epochs=2, lr=0.5, batch=5, stop=None, **options):
    """A run of so many epochs."""
    optimizer = torch.optim.SGD(fitted.model.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(1)
    with LiveIndex(fitted, folder, kind=KIND, optimizer=optimizer, **options) as live:
        for _ in range(epochs):
            for some in torch.randperm(len(data), generator=generator).split(batch):
                optimizer.zero_grad()
                with live.step(some):
                    TASK.loss(fitted.model, data.batch(some.tolist())).mean().backward()
                optimizer.step()
    return live


def test_the_last_row_of_an_example_stays(tmp_path):
    found = {}
    for keep in ("last", "first", "all"):
        torch.manual_seed(0)
        fitted, data = classifier()
        live = trained(fitted, data, tmp_path / keep, keep=keep, dtype="float32")
        found[keep] = live.index
    last, first, every = found["last"], found["first"], found["all"]
    assert (len(last), len(first), len(every)) == (N, N, 2 * N)
    for index, low in ((last, 5), (first, 0)):
        positions = index.positions_of(data.ids)
        steps = index.metadata(positions)["step"]
        assert low <= min(steps) and max(steps) < low + 5
        names = [f"{name}@{step}" for name, step in zip(data.ids, steps, strict=True)]
        assert torch.equal(index.rows(positions), every.rows(every.positions_of(names)))
    examples = every.metadata(every.live.nonzero().flatten())["example"]
    assert sorted(examples) == sorted(data.ids * 2)


def test_answers_come_from_the_trained_model_and_can_be_filtered_by_step(tmp_path):
    fitted, data = classifier()
    before = fitted.made_from["model"]
    live = trained(fitted, data, tmp_path)
    assert live.fit.made_from["model"] != before
    scores = live.index.attribute(live.fit, data.subset([0]), keep=N, where={"step": (5, 6)})
    steps = dict(
        zip(data.ids, live.index.metadata(live.index.positions_of(data.ids))["step"], strict=True)
    )
    assert {steps[name] for name in scores.train_ids} == {5, 6}
    assert scores.facts["index"]["live"] == {"keep": "last", "begun": 0, "saved": 10}
    with pytest.raises(ArtifactMismatch, match="another model"):
        torch.manual_seed(0)
        live.index.ask(classifier()[0], data.subset([0]))


def test_a_saved_fit_of_the_trained_model_asks_a_live_index(tmp_path):
    from headwater.core.fit import load

    fitted, data = classifier()
    live = trained(fitted, data, tmp_path / "index")
    live.fit.save(tmp_path / "fit")
    again = load(tmp_path / "fit", live.fit.model, data, TASK)
    asked = GradientIndex(tmp_path / "index").attribute(again, data.subset([1]), keep=3)
    assert torch.equal(
        asked.values, live.index.attribute(live.fit, data.subset([1]), keep=3).values
    )


def test_more_data_can_be_added_and_rows_removed(tmp_path):
    fitted, data = classifier()
    live = trained(fitted, data, tmp_path)
    more = TensorExamples(
        torch.randn(4, 6, dtype=torch.float64), torch.randint(3, (4,)), ids=list("abcd")
    )
    live.index.add(live.fit, more)
    live.index.remove(["e3", "a"])
    live.index.compact()
    assert len(live.index) == N + 2 and GradientIndex.verify(tmp_path) == []
    assert live.index.attribute(live.fit, data.subset([0]), keep=2).values.isfinite().all()


@pytest.fixture(scope="module")
def runs():
    with forking(live_runs) as made:
        yield made


def content(folder):
    """Ids, steps and rows of a live index, in their order, and its second moments."""
    assert GradientIndex.verify(folder / "index") == []
    index = GradientIndex(folder / "index")
    every = torch.arange(index.n_rows)
    files = {p.name for p in (folder / "index").iterdir()}
    assert len(files) == 2 * len(index.shards) + 2, f"left over: {files}"
    tables = (index.ids(every), index.numbers(every), index.metadata(every)["step"])
    return tables, index.rows(every), index.squares


@pytest.fixture(scope="module")
def uninterrupted(runs, tmp_path_factory):
    """What a run in one go leaves, and how long it takes at best."""
    folder, times = tmp_path_factory.mktemp("runs"), []
    for name in ("first", "second", "third"):
        started = time.monotonic()
        assert runs.run(folder / name) == 0
        times.append(time.monotonic() - started)
    return content(folder / "third"), min(times)


def assert_whole(folder, expected):
    tables, rows, squares = content(folder)
    assert tables == expected[0]
    assert torch.equal(rows, expected[1]) and torch.equal(squares, expected[2])


def killed_at_random(runs, uninterrupted, tmp_path, kills):
    """How many runs were killed; each went on from its checkpoint to the same rows."""
    expected, seconds = uninterrupted
    draw, killed, folders = random.Random(kills), 0, 0
    while killed < kills:
        folder, folders = tmp_path / f"killed {folders}", folders + 1
        for _ in range(4):
            after = draw.uniform(0.001, 0.9 * seconds)
            if runs.run(folder, after=after) == signal.SIGKILL:
                killed += 1
        assert runs.run(folder) == 0
        assert_whole(folder, expected)
    return killed


def test_a_killed_run_goes_on_from_its_checkpoint_without_losing_or_doubling_rows(
    runs, uninterrupted, tmp_path
):
    assert len(uninterrupted[0][0][0]) == live_runs.N
    assert killed_at_random(runs, uninterrupted, tmp_path, 8) >= 8


def ended_at_every(runs, uninterrupted, tmp_path, step):
    """How many system calls were tried; ended at each of them, a run went on to the same rows."""
    calls, tried = step, 0
    while runs.run(tmp_path / f"call {calls}", calls=calls) == 9:
        folder, tried = tmp_path / f"call {calls}", tried + 1
        assert runs.run(folder) == 0
        assert_whole(folder, uninterrupted[0])
        calls += step
    return tried


def test_a_run_that_ends_at_any_write_goes_on(runs, uninterrupted, tmp_path):
    assert ended_at_every(runs, uninterrupted, tmp_path, 61) >= 3


@pytest.mark.slow
def test_fifty_killed_runs_and_every_write(runs, uninterrupted, tmp_path):
    killed = killed_at_random(runs, uninterrupted, tmp_path / "a", 50)
    tried = ended_at_every(runs, uninterrupted, tmp_path / "b", 1)
    print(f"{killed} kills and {tried} system calls, all with the same rows in the end")
    assert killed >= 50 and tried > 100


# What is refused


def test_what_cannot_be_followed_is_refused(tmp_path):
    fitted, data = classifier()
    with LiveIndex(fitted, tmp_path / "a", kind=KIND) as live:
        with pytest.raises(ValueError, match="'nobody' is not among the 24"), live.step(["nobody"]):
            pytest.fail("went on")
        with pytest.raises(ValueError, match="one example or more"), live.step([]):
            pytest.fail("went on")
        with pytest.raises(LayerError, match="3 examples"), live.step([0, 1, 2]):
            TASK.loss(fitted.model, data.batch([0, 1])).sum().backward()
        said = r"losses of the 2 examples.*shape \(1,\)"
        with pytest.raises(ValueError, match=said), live.step([0, 1]) as step:
            step.follow(TASK.loss(fitted.model, data.batch([0, 1]))[:1])
        with live.step([0, 1]):  # and goes on as if nothing had happened
            TASK.loss(fitted.model, data.batch([0, 1])).mean().backward()
    assert live.index.ids() == ["e0", "e1"]
    with pytest.raises(ValueError, match="No row was written"), LiveIndex(fitted, tmp_path / "b"):
        pass
    with pytest.raises(ValueError, match="choose sides='leading' or sides='random'"):
        LiveIndex(
            fit(fitted.model, data, TASK, curvature="ekfac"), tmp_path / "c", kind=Whitened(rank=2)
        )


def test_a_batch_norm_in_training_mode_is_refused(tmp_path):
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    _, data = classifier()
    fitted = fit(model, data, TASK, curvature="identity")
    with LiveIndex(fitted, tmp_path, kind=KIND) as live:
        model.train()
        with pytest.raises(ValueError, match=r"batch norm .*eval"), live.step([0, 1]):
            pytest.fail("went on")
        model[1].eval()
        with live.step([0, 1]) as step:
            TASK.loss(model, data.batch([0, 1])).mean().backward()
    torch.testing.assert_close(step.rows, truth(fitted, live.space, data, torch.arange(2)))


def test_folders_of_other_runs_are_refused(tmp_path):
    fitted, data = classifier()
    built = GradientIndex.build(fitted, tmp_path / "built", kind=KIND, sample=0)
    with (
        pytest.raises(ArtifactMismatch, match="holds another index"),
        LiveIndex(fitted, built.folder),
    ):
        pytest.fail("went on")
    live = trained(fitted, data, tmp_path / "live")
    with pytest.raises(ArtifactMismatch, match="written while the model trained"):
        GradientIndex.build(live.fit, tmp_path / "live", kind=KIND, sample=0)
    for options, said in (
        ({}, "a finished live index of the steps up to 10"),
        ({"start": 12}, "Call save"),
        ({"start": 10, "keep": "all"}, "differ in keep"),
        ({"start": 10, "dtype": "float32"}, "differ in dtype"),
        ({"start": 10, "kind": LoGra(rank=2)}, "differ in projection"),
    ):
        options = {"kind": KIND} | options
        with (
            pytest.raises(ArtifactMismatch, match=said),
            LiveIndex(live.fit, live.folder, **options),
        ):
            pytest.fail("went on")
    with LiveIndex(live.fit, tmp_path / "busy", kind=KIND) as first:
        with pytest.raises(FolderBusy), LiveIndex(live.fit, tmp_path / "busy", kind=KIND):
            pytest.fail("went on")
        with first.step([0]):
            TASK.loss(fitted.model, data.batch([0])).sum().backward()


def test_a_finished_run_goes_on_with_more_steps(tmp_path):
    fitted, data = classifier()
    first = trained(fitted, data, tmp_path, epochs=1)
    second = trained(first.fit, data, tmp_path, epochs=1, start=5)
    steps = second.index.metadata(second.index.positions_of(data.ids))["step"]
    assert sorted(set(steps)) == [5, 6, 7, 8, 9]
    assert second.index.journal.facts["live"]["saved"] == 10


def test_damaged_rows_cannot_be_made_again(tmp_path):
    fitted, data = classifier()
    live = trained(fitted, data, tmp_path)
    file = tmp_path / live.index.journal.shards[0].rows_file
    content = bytearray(file.read_bytes())
    content[live.index.encoding.bytes_per_row * 3 + 400] ^= 1
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match="at parameters that are gone"):
        GradientIndex.repair(tmp_path, live.fit)


def test_rows_that_are_not_finite_are_left_out(tmp_path):
    fitted, data = classifier()
    with LiveIndex(fitted, tmp_path, kind=KIND) as live:
        with (
            pytest.warns(UserWarning, match="'e1' first.* not finite"),
            live.step([0, 1, 2]) as step,
        ):
            losses = TASK.loss(fitted.model, data.batch([0, 1, 2]))
            step.follow(losses)
            (losses * torch.tensor([1.0, torch.nan, 2.0])).sum().backward()
        fitted.model.zero_grad()
        with live.step([3, 4]) as step:
            losses = TASK.loss(fitted.model, data.batch([3, 4]))
            step.follow(losses)
            (losses * torch.tensor([1.0, 0.0])).sum().backward()
    assert live.index.ids() == ["e0", "e2", "e3"] and live.skipped == ["e1", "e4"]
