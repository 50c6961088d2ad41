"""An index survives what happens to it: kills, damage, full disks, other data and models, other writers."""

import errno
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from headwater.core.curvature import EKFAC
from headwater.core.files import (
    ArtifactDamaged,
    ArtifactError,
    ArtifactMismatch,
    ArtifactMissing,
    FolderBusy,
    OutOfDisk,
    read_json,
    write_json,
)
from headwater.core.fingerprint import fingerprint_json
from headwater.core.fit import fit
from headwater.core.index import GradientIndex, LoGra, Whitened
from headwater.core.locks import FolderLock
from tests import index_builds
from tests.forks import forking
from tests.index_builds import N, build, data, small_fit


def content(folder) -> dict[str, bytes]:
    """Every file of a folder."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(Path(folder).rglob("*"))
        if p.is_file()
    }


@pytest.fixture(scope="module")
def fitted():
    return small_fit()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, fitted):
    """An index that nothing happened to."""
    folder = tmp_path_factory.mktemp("index") / "whole"
    index = build(fitted, folder)
    assert sorted(index.numbers()) == list(range(N)) and len(index.shards) == 3
    return folder


@pytest.fixture
def index(tmp_path, whole):
    """A copy of it to be hurt."""
    return shutil.copytree(whole, tmp_path / "index")


@pytest.fixture(scope="module")
def builds():
    with forking(index_builds) as made:
        yield made


@pytest.fixture(scope="module")
def uninterrupted(builds, tmp_path_factory):
    """What a build in one go leaves, and how long it takes."""
    folder = tmp_path_factory.mktemp("builds") / "whole"
    started = time.monotonic()
    assert builds.run(folder) == 0
    return content(folder), time.monotonic() - started


def killed_at_random(builds, uninterrupted, tmp_path, kills: int) -> int:
    """How many builds were killed; each went on to the same bytes."""
    expected, seconds = uninterrupted
    draw, killed, folders = random.Random(kills), 0, 0
    while killed < kills:
        folder, folders = tmp_path / f"killed {folders}", folders + 1
        for _ in range(4):
            if builds.run(folder, after=draw.uniform(0.001, 0.9 * seconds)) == signal.SIGKILL:
                killed += 1
        assert builds.run(folder) == 0
        assert content(folder) == expected
    print(f"{killed} kills in {folders} builds, all byte-identical in the end")
    return killed


def test_a_killed_build_goes_on_and_ends_in_the_same_bytes(builds, uninterrupted, tmp_path):
    assert killed_at_random(builds, uninterrupted, tmp_path, 8) >= 8


@pytest.mark.slow
def test_fifty_killed_builds_end_in_the_same_bytes(builds, uninterrupted, tmp_path):
    assert killed_at_random(builds, uninterrupted, tmp_path, 50) >= 50


def ended_at_every(builds, uninterrupted, tmp_path, step: int) -> int:
    """How many system calls a build makes; ended at some of them it went on to the same bytes."""
    expected, _ = uninterrupted
    calls = step
    while True:
        folder = tmp_path / f"call {calls}"
        ended = builds.run(folder, calls=calls)
        if ended == 0:
            break
        assert ended == 9, f"ended by {ended} at call {calls}"
        assert builds.run(folder, calls=1_000_000) == 0
        assert content(folder) == expected, f"ended at call {calls}"
        shutil.rmtree(folder)
        calls += step
    print(f"ended at {calls // step - 1} of {calls} system calls, all byte-identical in the end")
    return calls


def test_a_build_that_ends_between_two_writes_goes_on(builds, uninterrupted, tmp_path):
    assert ended_at_every(builds, uninterrupted, tmp_path, 29) > 60


@pytest.mark.slow
def test_a_build_that_ends_between_any_two_writes_goes_on(builds, uninterrupted, tmp_path):
    assert ended_at_every(builds, uninterrupted, tmp_path, 1) > 60


def test_an_unfinished_index_is_not_read(builds, tmp_path):
    builds.run(tmp_path / "index", calls=30)
    for use in (GradientIndex, GradientIndex.verify):
        with pytest.raises(ArtifactMissing, match="goes on where it stopped"):
            use(tmp_path / "index")


def test_a_flipped_byte_anywhere_is_found_and_mended_or_refused(index, whole, fitted, capsys):
    expected, draw = content(whole), random.Random(0)
    mended = refused = 0
    files = [p for p in sorted(index.iterdir()) if p.name != ".lock"]
    for trial in range(30):
        path = draw.choice(files)
        raw = bytearray(path.read_bytes())
        place = draw.randrange(len(raw))
        raw[place] ^= draw.randrange(1, 256)
        path.write_bytes(raw)
        if path.name == "index.json":
            with pytest.raises(ArtifactError, match=r"index.json"):
                GradientIndex(index)
            path.write_bytes(expected[path.name])
            refused += 1
            continue
        found = GradientIndex.verify(index)
        assert [d.file for d in found] == [path.name]
        if path.name.startswith("rows") and place > 400:  # behind the header
            assert len(found[0].ids) == sum(b - a for a, b in found[0].rows) > 0
            assert len(found[0].ids) < N // 3
        GradientIndex.repair(index, fitted)
        assert content(index) == expected, f"trial {trial}: {path.name} at {place}"
        mended += 1
    print(f"30 flipped bytes: {mended} mended, {refused} refused")
    assert mended > 10


@pytest.mark.parametrize("harm", ["cut short", "missing", "longer", "empty"])
@pytest.mark.parametrize("kind", ["rows-00001.safetensors", "ids-00001.parquet"])
def test_a_file_that_is_not_whole_is_refused_and_mended(index, whole, fitted, harm, kind):
    path = index / kind
    if harm == "missing":
        path.unlink()
    elif harm == "longer":
        path.write_bytes(path.read_bytes() + b"more")
    else:
        path.write_bytes(path.read_bytes()[: 5000 if harm == "cut short" else 0])
    with pytest.raises(ArtifactDamaged, match=rf"{kind}.*index verify"):
        GradientIndex(index)
    assert [d.file for d in GradientIndex.verify(index)] == [kind]
    assert kind in str(GradientIndex.verify(index)[0])
    GradientIndex.repair(index, fitted)
    assert content(index) == content(whole) and GradientIndex.verify(index) == []


def test_only_damaged_rows_are_made_again(index, fitted, monkeypatch):
    path = index / "rows-00000.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-9] ^= 1  # of the last rows of the first shard
    path.write_bytes(raw)
    seen = []
    monkeypatch.setattr(
        index_builds.Slow, "batch",
        lambda self, indices: seen.extend(indices) or super(index_builds.Slow, self).batch(indices),
    )  # fmt: skip
    (damage,) = GradientIndex.repair(index, fitted)
    n_bad = sum(b - a for a, b in damage.rows)
    assert n_bad == 128 and len(seen) == 128  # four batches of thirty-two


def test_damage_of_several_files_and_of_the_second_moments_is_mended(tmp_path, fitted):
    folder = tmp_path / "logra"
    build(fitted, folder, kind=LoGra(rank=3), sample=0)
    GradientIndex(folder).add(fitted, data(150, seed=5, prefix="b"))
    expected = content(folder)
    first, last = "rows-00000.safetensors", "metric-00000.safetensors"
    for name in (first, last):
        raw = bytearray((folder / name).read_bytes())
        raw[len(raw) // 2] ^= 4
        (folder / name).write_bytes(raw)
    (folder / "ids-00002.parquet").unlink()
    assert {d.file for d in GradientIndex.verify(folder)} == {first, last, "ids-00002.parquet"}
    GradientIndex.repair(folder, fitted)
    assert content(folder) == expected
    (folder / "rows-00003.safetensors").unlink()  # rows that were added: other data
    with pytest.raises(ArtifactMismatch, match="other data"):
        GradientIndex.repair(folder, fitted)
    GradientIndex.repair(folder, fitted, data(150, seed=5, prefix="b"))
    assert content(folder) == expected


@pytest.mark.parametrize("kind", [Whitened(rank=4, damping=0.01, sides="leading"), LoGra(rank=3)])
def test_damage_of_several_sources_is_mended_source_by_source(tmp_path, fitted, kind):
    folder, more = tmp_path / "index", data(150, seed=5, prefix="b")
    build(fitted, folder, kind=kind, sample=0)
    GradientIndex(folder).add(fitted, more)
    expected = content(folder)
    names = ["rows-00000.safetensors", "rows-00003.safetensors", "ids-00003.parquet"]
    names += ["metric-00000.safetensors"] * isinstance(kind, LoGra)
    for name in names:
        raw = bytearray((folder / name).read_bytes())
        raw[len(raw) // 2] ^= 4
        (folder / name).write_bytes(raw)
    with pytest.raises(ArtifactMismatch, match="other data"):
        GradientIndex.repair(folder, fitted, data(20, seed=8, prefix="c"))
    mended = [d.file for d in GradientIndex.repair(folder, fitted, more)]
    assert sorted(mended) == ["ids-00003.parquet", "rows-00003.safetensors"]
    mended = [d.file for d in GradientIndex.repair(folder, fitted)]
    assert set(mended) == set(names) - {"ids-00003.parquet", "rows-00003.safetensors"}
    assert content(folder) == expected


def test_a_full_disk_stops_a_build_with_the_remedy_and_it_goes_on(
    fitted, whole, tmp_path, monkeypatch
):
    real, written = os.pwrite, 0

    def full(descriptor, content, place):
        nonlocal written
        written += 1
        if written > 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, content, place)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutOfDisk, match="Make room there"):
        build(fitted, tmp_path / "index")
    monkeypatch.setattr(os, "pwrite", real)
    build(fitted, tmp_path / "index")
    assert content(tmp_path / "index") == content(whole)


def test_a_really_full_disk_stops_a_build(fitted, whole, tmp_path):
    place = tmp_path / "small"
    place.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(place)]
    if subprocess.run(words, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    filler = place / "filler"
    try:
        filler.write_bytes(bytes(100_000))
        with pytest.raises(
            OutOfDisk, match=r"needs 0\.081\d? MB"
        ):  # told before anything is written
            build(fitted, place / "index", dtype="float32")
        with pytest.raises(OutOfDisk):  # in the middle: the tables of ids were not counted
            build(fitted, place / "index", dtype="int8", sample=0)
        filler.unlink()
        index = build(fitted, place / "index", dtype="int8", sample=0)
        assert sorted(index.ids()) == sorted(data().ids)
        del index  # its files are mapped
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_other_data_models_tasks_and_options_are_refused_by_name(index, fitted):
    other = fit(fitted.model, data(seed=1), fitted.task, curvature=EKFAC(folds=1), batch_size=32)
    with pytest.raises(ArtifactMismatch, match=r"projection|other data"):
        build(other, index)
    with pytest.raises(ArtifactMismatch, match="other data"):
        build(fitted, index, examples=data(seed=1))
    with pytest.raises(ArtifactMismatch, match="dtype"):
        build(fitted, index, dtype="int8")
    with pytest.raises(ArtifactMismatch, match="projection"):
        build(fitted, index, kind=Whitened(rank=3, damping=0.01))
    model = small_fit()
    with torch.no_grad():
        next(model.model.parameters()).mul_(2)
    changed = fit(model.model, data(), fitted.task, curvature=EKFAC(folds=1), batch_size=32)
    opened = GradientIndex(index)
    for use in (
        lambda: build(changed, index),
        lambda: opened.ask(changed, data(4, seed=2)),
        lambda: opened.add(changed, data(9, seed=2, prefix="c")),
        lambda: GradientIndex.repair(index, changed),
    ):
        with pytest.raises(ArtifactMismatch, match=r"another model|model \("):
            use()
    redrawn = fit(
        fitted.model, data(), fitted.task, curvature=EKFAC(folds=1, seed=3), batch_size=32
    )
    with pytest.raises(ArtifactMismatch, match="another curvature"):
        opened.ask(redrawn, data(4, seed=2))


def test_an_unfinished_build_of_other_data_is_refused(builds, fitted, tmp_path):
    assert builds.run(tmp_path / "index", calls=40) == 9
    with pytest.raises(ArtifactMismatch, match="other data"):
        build(fitted, tmp_path / "index", examples=data(seed=1))


def test_queries_of_another_projection_are_refused(index, fitted, tmp_path):
    other = build(fitted, tmp_path / "other", kind=Whitened(rank=3, damping=0.01), sample=0)
    with pytest.raises(ArtifactMismatch, match="another projection"):
        GradientIndex(index).search(other.ask(fitted, data(2, seed=2)))


def test_a_second_writer_is_refused(index, fitted):
    opened = GradientIndex(index)
    with FolderLock(index):
        for write in (
            lambda: opened.add(fitted, data(9, seed=2, prefix="c")),
            lambda: opened.remove(["a0"]),
            lambda: opened.compact(),
            lambda: build(fitted, index),
            lambda: GradientIndex.repair(index, fitted),
        ):
            with pytest.raises(FolderBusy, match="wait until it has finished"):
                write()
        assert len(GradientIndex(index)) == N  # reading goes on


def test_read_only_media_can_be_searched_and_verified(index, fitted):
    before = content(index)
    words = ["mount", "--bind", "-o", "ro", str(index), str(index)]
    mounted = subprocess.run(words, capture_output=True).returncode == 0
    if not mounted and os.geteuid() == 0:
        pytest.skip("root may write anywhere, and nothing can be mounted read-only here")
    if not mounted:
        index.chmod(0o555)
    try:
        with pytest.raises(OSError):
            (index / "probe").write_text("")
        opened = GradientIndex(index)
        assert opened.attribute(fitted, data(3, seed=2)).values.isfinite().all()
        assert opened.info()["rows"] == N and GradientIndex.verify(index) == []
        with pytest.raises(OSError):
            opened.remove(["a0"])
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(index)], check=True)
        index.chmod(0o755)
    assert content(index) == before


def test_a_journal_of_another_format_or_kind_is_refused(index):
    body = read_json(index / "index.json")
    for change in ({"format": 99}, {"kind": "fit"}, {"dtype": "int3"}, {"shards": [{}]}):
        other = {k: v for k, v in body.items() if k != "blake2b"} | change
        write_json(index / "index.json", other | {"blake2b": fingerprint_json(other)})
        with pytest.raises(ArtifactError, match=r"index.json"):
            GradientIndex(index)


def test_a_link_in_place_of_a_file_is_refused(index, tmp_path):
    path = index / "rows-00000.safetensors"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactDamaged, match="regular file"):
        GradientIndex(index)
    assert GradientIndex.verify(index)[0].what == "is not a regular file"


FAR = "/../../elsewhere"
HOSTILE = {
    "a shard's number is a path": lambda b: b["shards"][0].update(number=FAR),
    "the next shard's number is a path": lambda b: b.update(following=FAR),
    "the next shard is one that is there": lambda b: b.update(following=1),
    "a shard's number is negative": lambda b: b["shards"][0].update(number=-1),
    "two shards have one number": lambda b: b["shards"][1].update(number=0),
    "a shard's number is not whole": lambda b: b["shards"][0].update(number=1.5),
    "a block is absurdly large": lambda b: b["shards"][0]["blocks"].append(10**15),
    "a block is negative": lambda b: b["shards"][0]["blocks"].append(-256),
    "blocks are no list": lambda b: b["shards"][0].update(blocks=256),
    "a checksum is missing": lambda b: b["shards"][0]["digests"].pop(),
    "a shard is of no source": lambda b: b["shards"][0].update(source=7),
    "a shard is of a negative source": lambda b: b["shards"][0].update(source=-1),
    "rows begin behind their end": lambda b: b["shards"][0].update(first=10**15),
    "rows never end": lambda b: b["shards"][0].update(last=10**18),
    "rows that are not there were removed": lambda b: b["shards"][0].update(removed=[[0, 9999]]),
    "removed rows are no ranges": lambda b: b["shards"][0].update(removed=[3]),
    "removed rows are text": lambda b: b["shards"][0].update(removed=[["a", "b"]]),
    "removed rows overlap": lambda b: b["shards"][0].update(removed=[[0, 9], [5, 12]]),
    "a size is not a number": lambda b: b["shards"][0]["rows"].update(bytes=float("nan")),
    "a size is text": lambda b: b["shards"][0]["ids"].update(bytes="many"),
    "layers are a list": lambda b: b.update(layers=[1, 2]),
    "a layer has an absurd width": lambda b: b["layers"].update({"0": 10**15}),
    "a layer has no whole width": lambda b: b["layers"].update({"0": 2.5}),
    "there are no shards": lambda b: b.update(shards=[]),
    "the dtype is a list": lambda b: b.update(dtype=["int8"]),
    "the number of examples is zero": lambda b: b.update(n_train=0),
    "the number of examples is no number": lambda b: b.update(n_train=float("nan")),
    "the space is of no known kind": lambda b: b["space"].update(kind="pickle"),
    "the space has no damping": lambda b: b["space"].pop("damping"),
    "the damping is no number": lambda b: b["space"].update(damping={"value": "x"}),
    "kept columns are a list": lambda b: b["space"].update(kept=[1]),
    "the space is a text": lambda b: b.update(space="os.system"),
    "what it was made from is missing": lambda b: b.update(made_from={}),
    "sources are numbers": lambda b: b.update(sources=[1]),
    "a source has batches of nothing": lambda b: b["sources"][0].update(batch_size=0),
    "second moments have a path": lambda b: b.update(
        metric={"number": FAR, "shards": [], "bytes": 1, "blake2b": ""}
    ),
    "second moments are a list": lambda b: b.update(metric=[1]),
    "facts are a list": lambda b: b.update(facts=[1]),
    "the error is a text": lambda b: b.update(facts={"error": "none"}),
    "the error says nothing": lambda b: b.update(facts={"error": {"whole": {}}}),
    "what is pending is a text": lambda b: b.update(pending="soon"),
    "a pending shard has a path": lambda b: b.update(
        pending={"source": b["sources"][0], "shards": [b["shards"][0] | {"number": FAR}]}
    ),
    "an unknown key": lambda b: b.update(run="rm"),
}


def rewritten(folder, change) -> None:
    """Change what `index.json` says, with a checksum that fits."""
    body = read_json(folder / "index.json")
    del body["blake2b"]
    change(body)
    write_json(folder / "index.json", body | {"blake2b": fingerprint_json(body)})


@pytest.mark.parametrize("what", HOSTILE)
def test_a_journal_that_no_build_wrote_is_refused(index, fitted, what):
    rewritten(index, HOSTILE[what])
    before = content(index.parent)
    for use in (GradientIndex, GradientIndex.verify, lambda f: GradientIndex.repair(f, fitted)):
        with pytest.raises(ArtifactDamaged, match=r"index\.json.*build"):
            use(index)
    assert content(index.parent) == before  # nothing was written, here or elsewhere


def test_absurd_nesting_and_absurd_numbers_in_a_journal_are_refused(index):
    for text in ("[" * 100_000, '{"format": 1' + "0" * 5000 + "}", '{"a": NaN}', "", "\x00\xff"):
        (index / "index.json").write_text(text, encoding="latin-1")
        with pytest.raises(ArtifactDamaged, match=r"index\.json.*build"):
            GradientIndex(index)


@pytest.mark.parametrize(
    ("what", "change"),
    {
        "no ids": lambda t: t.drop_columns("id"),
        "no numbers": lambda t: t.drop_columns("number"),
        "fewer rows": lambda t: t.slice(1),
        "ids that are numbers": lambda t: t.set_column(0, "id", t["number"]),
        "numbers that are ids": lambda t: t.set_column(1, "number", t["id"]),
        "a column of JSON that is none": lambda t: t.append_column("json:x", t["id"]),
    }.items(),
)
def test_a_table_that_no_build_wrote_is_refused(index, fitted, what, change):
    import pyarrow.parquet as parquet

    path = index / "ids-00000.parquet"
    parquet.write_table(change(parquet.read_table(path)), path)
    rewritten(index, lambda b: b["shards"][0]["ids"].update(bytes=path.stat().st_size))
    with pytest.raises(ArtifactDamaged, match=r"(ids-00000\.parquet|json:x).*index verify"):
        GradientIndex(index).attribute(fitted, data(2, seed=2))


SPACES = {
    "a kept column is not there": lambda s: s["kept"]["0"].__setitem__(0, [[99]]),
    "kept columns are text": lambda s: s["kept"]["0"].__setitem__(1, "os"),
    "kept numbers are absurdly many": lambda s: s["kept"]["0"].__setitem__(2, [[0, 10**15]]),
    "kept columns are missing": lambda s: s.pop("kept"),
    "the kind has other options": lambda s: s.update(kind="sketched"),
    "the seed is a text": lambda s: s.update(kind="logra", init="random", seed="x", ranks={}),
}


@pytest.mark.parametrize("what", SPACES)
def test_coordinates_that_no_build_wrote_are_refused(index, fitted, what):
    rewritten(index, lambda b: SPACES[what](b["space"]))
    with pytest.raises(ArtifactMismatch, match=r"build (it|the index) again"):
        GradientIndex(index).ask(fitted, data(2, seed=2))


def test_rows_of_other_widths_than_the_coordinates_are_refused(index, fitted):
    def swap(body):
        (a, b), (c, d) = body["layers"].items()
        body["layers"] = {a: d, c: b}

    rewritten(index, swap)
    with pytest.raises(ArtifactMismatch, match="build it again"):
        GradientIndex(index).ask(fitted, data(2, seed=2))


@pytest.mark.parametrize("harm", ["a tensor is missing", "a tensor has another shape"])
def test_second_moments_that_no_build_wrote_are_refused(tmp_path, fitted, harm):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "logra"
    build(fitted, folder, kind=LoGra(rank=3), sample=0)
    path = folder / "metric-00000.safetensors"
    for name in ("values:0", "vectors:2", "squares:0"):
        tensors = load_file(path)
        kept = dict(tensors)
        if harm == "a tensor is missing":
            del kept[name]
        else:
            kept[name] = kept[name][1:].contiguous()
        save_file(kept, path)
        rewritten(folder, lambda b: b["metric"].update(bytes=path.stat().st_size))
        if harm == "a tensor is missing" and name == "squares:0":
            break  # rows that were added later have none
        with pytest.raises(ArtifactDamaged, match="second moments"):
            GradientIndex(folder).attribute(fitted, data(2, seed=2), mode="relatif")
        save_file(tensors, path)
