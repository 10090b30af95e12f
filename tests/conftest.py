"""``--nightly`` runs the long profile; without it, tests marked ``nightly`` are skipped."""

from __future__ import annotations

import hypothesis
import pytest

# Seeds are fixed, so that a failure is one for everybody; --nightly draws new examples, and more of them.
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=60)
hypothesis.settings.register_profile("nightly", deadline=None, max_examples=1_000, print_blob=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--nightly", action="store_true", help="run the long profile: minutes instead of seconds"
    )


def pytest_configure(config: pytest.Config) -> None:
    hypothesis.settings.load_profile("nightly" if config.getoption("--nightly") else "fixed")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--nightly"):
        return
    skip = pytest.mark.skip(reason="belongs to the long profile: run with --nightly")
    for item in items:
        if "nightly" in item.keywords:
            item.add_marker(skip)
