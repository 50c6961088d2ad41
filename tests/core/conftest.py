import os

import pytest


@pytest.fixture(scope="module", autouse=True)
def no_waiting_for_disks():
    """Tests of what a dead process leaves behind need no disk to have caught up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield
