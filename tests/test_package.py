"""What the package promises before anything is computed: it loads fast, lazily and with advice."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import headwater
from headwater.extras import require


def run(code: str) -> str:
    """Run `code` in a fresh interpreter, since this one has imported torch already."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def loaded_after(code: str) -> set[str]:
    """Top-level packages in memory after `code`."""
    names = run(f"{code}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})")
    return set(names.split())


HEAVY = {"torch", "numpy", "pyarrow", "transformers", "peft", "pandas", "matplotlib", "tyro"}


def test_importing_headwater_loads_nothing_heavy():
    loaded = loaded_after("import headwater")
    assert "headwater" in loaded
    assert loaded.isdisjoint(HEAVY)


def test_importing_the_command_line_loads_no_torch():
    assert loaded_after("import headwater.cli").isdisjoint({"torch", "transformers", "pandas"})


def test_the_package_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "headwater", "--version"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == headwater.__version__


def test_using_the_core_loads_torch_but_no_optional_dependency():
    loaded = loaded_after("import headwater; headwater.fit; headwater.trace")
    assert "torch" in loaded
    assert loaded.isdisjoint({"transformers", "peft", "accelerate", "pandas", "matplotlib"})


@pytest.mark.parametrize("name", headwater.__all__)
def test_every_public_name_resolves_and_is_listed(name):
    assert getattr(headwater, name) is not None
    assert name in dir(headwater)


def test_public_names_are_those_of_their_home_modules():
    from headwater.core.task import Classification

    assert headwater.Classification is Classification
    assert headwater.trace.__name__ == "headwater.trace"


def test_an_unknown_name_is_refused_with_the_list_of_names():
    with pytest.raises(AttributeError, match=r"no 'attribute'; it offers .*cite.*fit.*load"):
        headwater.attribute  # noqa: B018


def test_the_version_is_that_of_the_installed_distribution():
    assert importlib.metadata.version("headwater") == headwater.__version__


def test_require_returns_the_module():
    assert require("json", extra="language").loads("[1]") == [1]


def test_require_names_the_extra_of_a_missing_module():
    with pytest.raises(ImportError, match=r"pip install 'headwater\[language\]'") as caught:
        require("no_such_module", extra="language")
    assert "'no_such_module' is needed here but is not installed;" in str(caught.value)
    assert caught.value.name == "no_such_module"


def test_require_names_the_missing_requirement_of_a_module(tmp_path, monkeypatch):
    (tmp_path / "half_installed.py").write_text("import not_there")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=r"it needs 'not_there'.*headwater\[report\]"):
        require("half_installed", extra="report")


def test_require_does_not_hide_other_errors(tmp_path, monkeypatch):
    (tmp_path / "broken_module.py").write_text("raise RuntimeError('broken inside')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match="broken inside"):
        require("broken_module", extra="report")


def test_every_package_has_a_page_in_the_reference():
    root = Path(headwater.__file__).parent
    packages = {path.parent.name for path in root.glob("*/__init__.py")}
    pages = {path.stem for path in (root.parent / "docs" / "api").glob("*.md")} - {"index"}
    assert "core" in packages
    assert packages == pages
