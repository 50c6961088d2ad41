"""Run folders that the tests of views, pages and files read."""

import pytest

from tests import runs


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return runs.plain_run(tmp_path_factory.mktemp("runs") / "plain")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    return runs.hostile_run(tmp_path_factory.mktemp("runs") / "<b>hostile")
