"""A small draft."""

from __future__ import annotations

from pathlib import Path

import pytest
from drafts import make_draft


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_draft(tmp_path_factory.mktemp("drafts") / "small")
