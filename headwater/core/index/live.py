"""A live index: rows written by the training pass itself, each at the parameters of its own step.

Around a loop of your own:

    with LiveIndex(fit, "runs/a/index", optimizer=optimizer) as live:
        for batch in loader:
            with live.step(batch["id"]) as step:
                losses = task.loss(model, batch)     # one number an example
                step.follow(losses)                  # whatever mean is taken of them is undone
                losses.mean().backward()
            optimizer.step()
            optimizer.zero_grad()

No second pass is made: hooks read what the layers of `fit` see in your own forward and backward pass. For the Trainer
of `transformers` there is `headwater.training.live.index_trainer`.

**What a row is.** The gradient of the example's own loss, summed over its tokens, at the parameters of the step that
saw it, under the dropout of that step. Rows of one index therefore belong to different parameters; the column `step`
says which. Asked at the end, an index answers with the gradients that trained the model, not with those at the end.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from headwater.core.files import ArtifactMismatch, ArtifactMissing
from headwater.core.fingerprint import fingerprint_model, short
from headwater.core.fit import Fit
from headwater.core.index.encoding import Dtype
from headwater.core.index.gradient_index import BLOCK_ROWS, SHARD_BYTES, GradientIndex
from headwater.core.index.journal import Journal, Pending, ShardFacts, Source, ranges_of
from headwater.core.index.metric import fit_metric
from headwater.core.index.outliers import Outlier, Outliers, SelfInfluence, Watch
from headwater.core.index.shards import Shard, ShardWriter, shard_name
from headwater.core.index.spaces import LoGra, LoGraSpace, SketchedSpace, Space, Whitened
from headwater.core.index.writing import clean, write_table
from headwater.core.listening import Listener
from headwater.core.locks import FolderLock
from headwater.core.scores import to_column

Sight = Literal["last", "first", "all"]
_SEGMENT_BYTES = 1 << 25  # of rows that wait in memory for their files


class LiveIndex:
    """Writes index rows while a model trains; use it as a context manager.

    Rows wait in memory and reach the disk in files of their own, whole or not at all: whenever enough wait, and when
    `save` is called, which belongs before each checkpoint of the training. A killed run goes on with `start=` the steps
    that its checkpoint had made: rows of those are kept, rows of later steps are dropped, since training makes them
    again.

    Args:
        fit: A fit of the model in training, made before: it names the layers, the data and the task, and gives the
            coordinates. For random LoGra `headwater.fit(model, train, task, curvature="identity")` will do.
        folder: Where the index goes.
        kind: What a row is; random `LoGra()` when left out.
        optimizer: Its steps are counted; without one every `step` block counts as one.
        dtype: How rows are stored.
        keep: Which row of an example stays that was seen several times: the "last", nearest to the final parameters;
            the "first"; or "all", under ids such as "e7@120" (120 is the step).
        start: Steps that were made before.
        outliers: How examples are found that are far outside what recent rows show; None looks for none.

    Attributes:
        index: The finished index, once the block has ended.
        fit: The fit; once the block has ended it is of the trained model, and asks the index.
        skipped: Ids of rows that were not finite, or whose loss had no weight.

    Raises:
        ArtifactMismatch: The folder holds another index, or not all rows before `start`.
        ValueError: A layer's gradients cannot be read off a training pass, or the data has a column `step` already.

    Example:
        >>> import tempfile, headwater
        >>> from headwater.core.task import Classification
        >>> model = torch.nn.Linear(3, 2)
        >>> x, y = torch.randn(8, 3), torch.arange(8) % 2
        >>> fit = headwater.fit(model, (x, y), Classification(), curvature="identity")
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with LiveIndex(fit, folder, optimizer=sgd) as live:
        ...         for some in torch.arange(8).split(4):
        ...             with live.step(some) as step:
        ...                 losses = fit.task.loss(model, (x[some], y[some]))
        ...                 step.follow(losses)
        ...                 losses.mean().backward()
        ...             sgd.step()
        ...             sgd.zero_grad()
        ...     scores = live.index.attribute(live.fit, (x[:2], y[:2]), keep=3, where={"step": (1, 1)})
        >>> scores.metadata["step"]
        [1, 1, 1, 1]
    """

    def __init__(
        self,
        fit: Fit,
        folder: str | Path,
        *,
        kind: Whitened | LoGra | None = None,
        optimizer: Optimizer | None = None,
        dtype: Dtype = "int8",
        keep: Sight = "last",
        start: int = 0,
        outliers: Outliers | None = Outliers(),  # noqa: B008
    ):
        if keep not in ("last", "first", "all"):
            raise ValueError(f"Expected keep 'last', 'first' or 'all'; got {keep!r}.")
        if taken := {"step", "example"} & set(fit.train.metadata):
            raise ValueError(
                f"A live index has metadata columns of its own, 'step' and 'example'; the data has {min(taken)!r} "
                "already. Give that another name."
            )
        self.fit, self.folder, self.keep = fit, Path(folder), keep
        self.optimizer = optimizer
        self.dtype: Dtype = dtype
        self.space = _space(fit, kind or LoGra())
        self.listener = Listener(
            fit.model,
            fit.task,
            [x for x in fit.followed if self.space.width(x)],
            two_sided(self.space),
        )
        self.index: GradientIndex | None = None
        self.skipped: list[str] = []
        options = outliers or Outliers()
        self._watch = None if outliers is None else Watch(options)
        plain = not isinstance(self.space, LoGraSpace)
        self._self_influence = SelfInfluence(None if plain else self.space.widths, options.window)
        self._number = {name: i for i, name in enumerate(fit.train.ids)}
        self._norms = [m for m in fit.model.modules() if isinstance(m, _BatchNorm)]
        self._start = self._step = start
        self._stack, self._waiting = ExitStack(), _Waiting()

    @property
    def outliers(self) -> list[Outlier]:
        """Examples that were warned of, in the order of their appearance."""
        return [] if self._watch is None else self._watch.found

    @property
    def flagged(self) -> float:
        """Share of rows that stood out, of those that were compared with earlier ones."""
        watch = self._watch
        return 0.0 if watch is None else watch.flagged / max(watch.judged, 1)

    def __enter__(self) -> "LiveIndex":
        with ExitStack() as stack:
            stack.enter_context(FolderLock(self.folder))
            self._journal = self._begun()
            stack.enter_context(self.listener.hooks())
            if self.optimizer is not None:
                stack.callback(self.optimizer.register_step_post_hook(self._count).remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        with self._stack:
            if kind is None:
                self._finish()

    def _count(self, *_: Any) -> None:
        self._step += 1

    @contextmanager
    def step(
        self,
        examples: Sequence[str] | Sequence[int] | Tensor,
        *,
        normalizer: float | int | Tensor | None = None,
        number: int | None = None,
    ) -> Iterator["Step"]:
        """Around one forward and one backward pass over some examples.

        The loss that is differentiated must be a sum of the examples' own losses, each divided by something: told by
        `normalizer`, or seen by the block's `follow`. Parts of it that mix examples, such as a penalty on what a batch
        activates, enter the rows. With gradient accumulation each of the passes is a block of its own.

        Args:
            examples: Ids of the batch's examples, or their numbers in the fit's data.
            normalizer: What the examples' summed losses are divided by, for all or for each; their number when left
                out, as for the mean over the batch. For the mean over the batch's tokens it is how many are scored,
                under gradient scaling that divided by the scale.
            number: Steps made before this one, in loops that count them; counted here when left out.

        Raises:
            ValueError: An example is not of the fit's data, or a batch norm in training mode mixes examples.
            LayerError: A layer did not run, or ran twice after its gradient had come.
        """
        numbers = self._numbers(examples)
        if any(m.training for m in self._norms):
            raise ValueError(
                "A batch norm in training mode makes each example's gradient depend on the others of its batch, so "
                "that there is no row of one example; put it into evaluation mode (module.eval()), or index "
                "after training."
            )
        self._step = self._step if number is None else number
        step = Step(len(numbers), normalizer)
        with self.listener.listening(len(numbers)) as found:
            yield step
        rows = torch.cat([found[name] for name in self.listener.layers], dim=1)
        weights = step.weights(rows)
        step.rows = rows / weights[:, None]
        self._take(numbers, step, weights != 0)
        if self.optimizer is None and number is None:
            self._step += 1

    def _numbers(self, examples: Any) -> list[int]:
        told = examples.tolist() if isinstance(examples, Tensor) else list(examples)
        found = [self._number.get(each, -1) if isinstance(each, str) else each for each in told]
        for name, number in zip(told, found, strict=True):
            if not 0 <= number < len(self._number):
                raise ValueError(
                    f"Example {name!r} is not among the {len(self._number):,} of the fit's data; fit with the data "
                    "that is trained on, or tell the ids of that."
                )
        if not found:
            raise ValueError("A step has one example or more; got none.")
        return found

    def _take(self, numbers: list[int], step: "Step", weighed: Tensor) -> None:
        """Rows of a batch, into memory; those that say nothing are left out."""
        ids, rows = self.fit.train.ids, step.rows.cpu()
        good = weighed.cpu() & rows.isfinite().all(1)
        chosen = [n for n, ok in zip(numbers, good.tolist(), strict=True) if ok]
        if len(chosen) < len(numbers):
            left = [n for n, ok in zip(numbers, good.tolist(), strict=True) if not ok]
            self._skip([ids[n] for n in left])
        if not chosen:
            return
        rows = rows.float()[good]
        if self._watch is not None:
            losses = None if step.losses is None else step.losses.cpu()[good]
            self._look(chosen, rows, losses)
        self._waiting.add(chosen, self._step, self._journal.encoding.encode(rows))
        if self._waiting.nbytes >= _SEGMENT_BYTES:
            self._seal()

    def _look(self, numbers: list[int], rows: Tensor, losses: Tensor | None) -> None:
        """Warn of what stands out: by the losses where they are told, else by the rows."""
        train = self.fit.train
        if losses is None:
            measure, values = "self-influence", self._self_influence(rows)
        else:
            measure, lengths = "loss", train.lengths
            ones = [1] * len(numbers) if lengths is None else [lengths[n] for n in numbers]
            values = losses.double() / torch.tensor(ones)
        if self._watch is not None:
            self._watch.update([train.ids[n] for n in numbers], self._step, measure, values)

    def _skip(self, ids: list[str]) -> None:
        if not self.skipped:
            warnings.warn(
                f"Rows of {len(ids)} examples ({ids[0]!r} first) at step {self._step} are not finite or have no weight "
                "in the loss; such rows are left out (`skipped` lists them).",
                stacklevel=6,
            )
        self.skipped += ids

    def save(self, number: int | None = None) -> None:
        """Put all rows so far on the disk; do so before each checkpoint that training may go on from.

        Args:
            number: Steps made so far, in loops that count them.
        """
        self._step = self._step if number is None else number
        self._seal()

    # Files

    @property
    def _facts(self) -> dict[str, Any]:
        begun = self._journal.facts["live"]["begun"]
        return {"live": {"keep": self.keep, "begun": begun, "saved": self._step}}

    def _begun(self) -> Journal:
        """The journal to go on with."""
        fit, space = self.fit, self.space
        journal = Journal(
            made_from={"model": "", "task": fit.task.name, "projection": space.fingerprint},
            space=space.record(),
            layers=space.widths,
            dtype=self.dtype,
            n_train=len(fit.train),
            facts={"live": {"keep": self.keep, "begun": self._start, "saved": self._start}},
        )
        size = journal.encoding.bytes_per_row
        source = Source(
            data=fit.made_from["data"],
            n=len(fit.train),
            batch_size=fit.batch_size,
            batch_tokens=fit.batch_tokens,
            block_rows=BLOCK_ROWS,
            shard_rows=max(BLOCK_ROWS, SHARD_BYTES // size),
            training=True,
        )
        try:
            old = Journal.read(self.folder)
        except ArtifactMissing:
            journal = replace(journal, pending=Pending(source=source))
        else:
            journal = self._going_on(old, journal, source)
        journal.write(self.folder)
        clean(self.folder, journal)
        return journal

    def _going_on(self, old: Journal, new: Journal, source: Source) -> Journal:
        """The journal of a run that was killed, or has ended and goes on, without rows that are made again."""
        known, finished = old.pending, len(old.sources) == 1 and old.pending is None
        if finished and old.sources[0].training:
            known = Pending(source=old.sources[0], shards=old.shards)
        if known is None or not known.source.training or (old.sources and not finished):
            raise ArtifactMismatch(
                f"{self.folder} holds another index; choose another folder, or remove that one."
            )
        pairs = {
            "task": (old.made_from["task"], new.made_from["task"]),
            "projection": (old.made_from["projection"], new.made_from["projection"]),
            "data": (known.source.data, source.data),
            "dtype": (old.dtype, new.dtype),
            "keep": (old.facts["live"]["keep"], self.keep),
        }
        if differ := [f"{k} ({short(a)} and {short(b)})" for k, (a, b) in pairs.items() if a != b]:
            raise ArtifactMismatch(
                f"The live index in {self.folder} and what is asked for now differ in {', '.join(differ)}; choose "
                "another folder."
            )
        saved = old.facts["live"]["saved"]
        if self._start > saved or (finished and self._start != saved):
            made = "a finished live index" if finished else "rows"
            raise ArtifactMismatch(
                f"{self.folder} holds {made} of the steps up to {saved}; training goes on behind step {self._start}, "
                "so that rows would be missing or doubled. Call save() before each checkpoint of the training, pass "
                "start= the steps that the checkpoint had made, or choose another folder."
            )
        pending = Pending(source=known.source, shards=self._before(known.shards))
        facts = {"live": old.facts["live"] | {"saved": self._start}}
        return replace(old, sources=[], shards=[], pending=pending, metric=None, facts=facts)

    def _before(self, shards: list[ShardFacts]) -> list[ShardFacts]:
        """Shards with the rows from the step that training goes on with marked as removed."""
        kept = []
        for shard in shards:
            again = torch.tensor(self._table(shard)["meta:step"].to_pylist()) >= self._start
            if not bool(again.all()):
                kept.append(replace(shard, removed=ranges_of(again | ~shard.live())))
        return kept

    def _table(self, shard: ShardFacts) -> Any:
        import pyarrow.parquet

        return pyarrow.parquet.read_table(self.folder / shard.ids_file)

    def _seal(self) -> None:
        """Rows in memory become a file, which the journal then lists."""
        pending = self._journal.pending
        if pending is None:
            raise ValueError("The live index is not open; use it as a context manager.")
        shards = list(pending.shards)
        if self._waiting.numbers:
            waiting, self._waiting = self._waiting, _Waiting()
            first = shards[-1].last if shards else 0
            shards.append(
                _write(
                    self.folder,
                    self._journal,
                    self._journal.following,
                    first,
                    waiting.blocks(),
                    len(waiting.numbers),
                    self._columns(waiting.numbers, waiting.steps),
                )
            )
        self._journal = replace(
            self._journal,
            pending=replace(pending, shards=shards),
            following=max([s.number + 1 for s in shards], default=self._journal.following),
            facts=self._facts,
        )
        self._journal.write(self.folder)

    def _columns(self, numbers: list[int], steps: list[int]) -> dict[str, list]:
        """The table of some rows: ids, numbers, step, and the data's metadata."""
        train = self.fit.train
        names = [train.ids[n] for n in numbers]
        ids = [f"{a}@{s}" for a, s in zip(names, steps, strict=True)]
        metadata = {k: [v[n] for n in numbers] for k, v in train.metadata.items()}
        if self.keep == "all":
            metadata["example"] = names
        metadata["step"] = steps
        columns = dict(to_column(k, v) for k, v in metadata.items())
        return {"id": ids if self.keep == "all" else names, "number": numbers} | columns

    def _finish(self) -> None:
        """Put the rows that stay into shards of the usual size, fit their metric, and name the trained model."""
        self._seal()
        journal = self._journal
        pending = journal.pending
        if pending is None or not any(s.n_live for s in pending.shards):
            raise ValueError(
                "No row was written; put forward and backward passes into `step` blocks."
            )
        made_from = journal.made_from | {"model": fingerprint_model(self.fit.model)}
        shards = _merged(self.folder, journal, pending, last=self.keep != "first")
        journal = replace(
            journal,
            made_from=made_from,
            sources=[pending.source],
            shards=shards,
            pending=None,
            following=shards[-1].number + 1,
        )
        if isinstance(self.space, LoGraSpace):
            journal = replace(journal, metric=fit_metric(self.folder, journal))
        journal.write(self.folder)
        clean(self.folder, journal)
        own = {"made_from": self.fit.made_from | {"model": made_from["model"]}}
        self.fit = replace(self.fit, facts=self.fit.facts | own)
        self.index = GradientIndex(self.folder)


class Step:
    """One pass of a live index.

    Attributes:
        rows: (batch, dim) gradients of the examples' own losses, projected, once the block has ended.
        losses: The examples' own losses, where they were told.
    """

    rows: Tensor
    losses: Tensor | None = None

    def __init__(self, n: int, normalizer: float | int | Tensor | None):
        self.n, self.normalizer = n, normalizer
        self._followed: Tensor | None = None

    def follow(self, losses: Tensor, normalizer: float | int | Tensor = 1) -> None:
        """Read off the backward pass what the examples' own losses are multiplied by; watch them, too.

        Args:
            losses: The losses of the examples (batch), each summed over its tokens, of which the loss is then made by
                whatever mean, scaling and weighting; or one number, their sum over `normalizer`, whatever is done to it
                afterwards.
            normalizer: What they have been divided by already.
        """
        if losses.shape not in ((self.n,), ()) or not losses.requires_grad:
            raise ValueError(
                f"Expected the losses of the {self.n} examples, of which the loss is made, or one number; got shape "
                f"{tuple(losses.shape)}{'' if losses.requires_grad else ' without a gradient'}."
            )
        self.normalizer, self._followed = normalizer, torch.zeros_like(losses)
        if losses.ndim:
            self.losses = losses.detach() * normalizer

        def receive(g: Tensor) -> None:
            self._followed = g.detach()

        losses.register_hook(receive)

    def weights(self, like: Tensor) -> Float[Tensor, " batch"]:
        """What each example's own loss was multiplied by."""
        n = self.n if self.normalizer is None else self.normalizer
        factor = 1.0 if self._followed is None else self._followed.to(like)
        return (factor / torch.as_tensor(n).to(like)).expand(self.n)


class _Waiting:
    """Rows that are not on the disk yet, as they will be stored."""

    def __init__(self):
        self.numbers: list[int] = []
        self.steps: list[int] = []
        self.parts: list[dict[str, Tensor]] = []
        self.nbytes = 0

    def add(self, numbers: list[int], step: int, parts: dict[str, Tensor]) -> None:
        self.numbers += numbers
        self.steps += [step] * len(numbers)
        self.parts.append(parts)
        self.nbytes += sum(t.nbytes for t in parts.values())

    def blocks(self) -> Iterator[dict[str, Tensor]]:
        """All rows, in blocks."""
        whole = {k: torch.cat([p[k] for p in self.parts]) for k in self.parts[0]}
        for start in range(0, len(self.numbers), BLOCK_ROWS):
            yield {k: v[start : start + BLOCK_ROWS] for k, v in whole.items()}


def two_sided(space: Space) -> Any:
    """The projection behind a space: two-sided where it is nothing else."""
    return space.projection if isinstance(space, LoGraSpace | SketchedSpace) else space


def _space(fit: Fit, kind: Whitened | LoGra) -> Space:
    spaces = kind.spaces(fit)
    if len(spaces) > 1:
        raise ValueError(
            "Which coordinates of Whitened are better is measured when an index is built; for a live one choose "
            "sides='leading' or sides='random'."
        )
    return spaces[0]


def _write(
    folder: Path,
    journal: Journal,
    number: int,
    first: int,
    blocks: Iterator[dict[str, Tensor]],
    n: int,
    columns: Any,
) -> ShardFacts:
    """A sealed shard of n rows that come in blocks."""
    sizes = [min(BLOCK_ROWS, n - start) for start in range(0, n, BLOCK_ROWS)]
    for left in folder.glob(f".{shard_name(number)}.*"):
        left.unlink()  # of a killed run, whose rows are not these
    (folder / shard_name(number)).unlink(missing_ok=True)
    with ShardWriter(folder, number, sizes, journal.encoding) as writer:
        writer.open()
        for parts in blocks:
            own = {k: v for k, v in parts.items() if k != "squares"}
            writer.write_parts(own | {"squares": journal.encoding.decode(own).square().sum(1)})
        rows = writer.seal()
    return ShardFacts(
        number=number,
        source=0,
        first=first,
        last=first + n,
        blocks=sizes,
        digests=writer.digests,
        rows=rows,
        ids=write_table(folder, number, columns),
    )


def _merged(folder: Path, journal: Journal, pending: Pending, *, last: bool) -> list[ShardFacts]:
    """Shards of the usual size with one row of each id, its last or its first."""
    import pyarrow
    import pyarrow.parquet

    shards = pending.shards
    tables = [pyarrow.parquet.read_table(folder / s.ids_file) for s in shards]
    table = pyarrow.concat_tables(tables, promote_options="permissive")
    live = torch.cat([s.live() for s in shards]).tolist()
    place: dict[str, int] = {}
    for position, name in enumerate(table["id"].to_pylist()):
        if live[position] and (last or name not in place):
            place[name] = position
    kept = torch.tensor(sorted(place.values()))
    stored = [Shard(folder / s.rows_file, journal.layout(s)) for s in shards]
    starts = torch.tensor([0, *(len(s) for s in stored)]).cumsum(0)
    made = []
    for part in kept.split(pending.source.shard_rows):
        made.append(
            _write(
                folder,
                journal,
                journal.following + len(made),
                sum(s.n for s in made),
                (_gathered(stored, starts, some) for some in part.split(BLOCK_ROWS)),
                len(part),
                table.take(pyarrow.array(part.numpy())),
            )
        )
    return made


def _gathered(
    stored: Sequence[Shard], starts: Tensor, positions: Int[Tensor, " row"]
) -> dict[str, Tensor]:
    """Rows at ascending positions over several shards, as they are stored."""
    owners = torch.searchsorted(starts, positions, right=True) - 1
    parts = [stored[i].stored(positions[owners == i] - starts[i]) for i in owners.unique().tolist()]
    return {name: torch.cat([p[name] for p in parts]) for name in parts[0]}
