"""The tables in the documentation are those of the code."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from resilientdb.policy.faults import Fault
from tests.docs.generate import MEANINGS, documents

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(("path", "text"), documents().items(), ids=lambda value: getattr(value, "name", ""))
def test_in_step_with_the_code(path: Path, text: str) -> None:
    assert path.read_text(encoding="utf-8") == text, "out of date: run python -m tests.docs.generate"


def test_every_fault_is_explained() -> None:
    assert set(MEANINGS) == set(Fault)
