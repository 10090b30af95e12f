"""The web examples through an outage: 200 before, a quick and honest 503 during, 200 after."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from resilientdb.testing import faults

if TYPE_CHECKING:
    from collections.abc import Callable

    import httpx

    from resilientdb.testing import Postgres, Proxy

EXAMPLES = [
    ("uvicorn", "fastapi_app", "asyncpg"),
    ("uvicorn", "starlette_app", "psycopg"),
    ("flask", "flask_app", "psycopg"),
    ("uvicorn", "sqlmodel_app", "psycopg?plugin=resilientdb&resilientdb_profile=web"),
]
RECOVERY = 5.0
"""Seconds from the end of the outage to the first 200; two probes on a busy machine."""


@pytest.fixture(params=EXAMPLES, ids=lambda example: example[1])
def example(request: pytest.FixtureRequest) -> tuple[str, str, str]:
    chosen: tuple[str, str, str] = request.param
    return chosen


@pytest.mark.parametrize("fault", [faults.down, faults.hang], ids=["down", "hang"])
def test_outage(
    serve: Callable[..., Any],
    resilientdb_proxy: Proxy,
    example: tuple[str, str, str],
    fault: Callable[[Proxy], Any],
) -> None:
    site = serve(*example)
    assert site.fetch("POST", "/items", json={"name": "before"}).status_code == 201
    assert site.get("/items").json() == ["before"]
    assert site.get("/internal/readyz").status_code == 200

    with fault(resilientdb_proxy):
        assert_refused(site.get("/items"))
        with ThreadPoolExecutor(8) as clients:  # more at once than there are connections
            for response in clients.map(lambda _: site.get("/items"), range(40)):
                assert_refused(response)
        assert_refused(site.fetch("POST", "/items", json={"name": "during"}))
        refused_in = min(seconds(lambda: assert_refused(site.get("/items"))) for _ in range(5))
        assert refused_in < 0.2, "an open circuit answers at once"
        assert site.get("/internal/livez").status_code == 200
        assert site.get("/internal/readyz").status_code == 200, "the fault is not this process's"
        assert site.get("/internal/health").json() == {"status": "fail", "state": "down"}

    assert site.until(200, "/items", within=RECOVERY).json() == ["before"]
    assert site.fetch("POST", "/items", json={"name": "after"}).status_code == 201
    assert site.get("/items").json() == ["before", "after"]
    assert site.get("/internal/health").json() == {"status": "pass", "state": "healthy"}


def test_fastapi_sync_route(serve: Callable[..., Any], resilientdb_proxy: Proxy) -> None:
    site = serve("uvicorn", "fastapi_app", "asyncpg")
    site.fetch("POST", "/items", json={"name": "one"})
    assert site.get("/count").json() == 1
    with faults.down(resilientdb_proxy):
        assert_refused(site.get("/count"))
    assert site.until(200, "/count", within=RECOVERY).json() == 1


def test_reads_go_on_from_a_replica(
    serve: Callable[..., Any], resilientdb_proxy: Proxy, resilientdb_standby: Postgres
) -> None:
    site = serve("uvicorn", "starlette_app", "psycopg", REPLICAS=resilientdb_standby.address)
    site.fetch("POST", "/items", json={"name": "one"})
    wait_until = time.monotonic() + 5
    while site.get("/items").json() != ["one"]:  # a replica may be behind
        assert time.monotonic() < wait_until
    with faults.hang(resilientdb_proxy):
        for _ in range(20):
            assert site.get("/items").json() == ["one"]
        assert_refused(site.fetch("POST", "/items", json={"name": "two"}))
        refused = site.fetch("POST", "/items", json={"name": "two"})
        assert refused.json()["reason"] == "no-primary"
        assert site.get("/internal/health").json() == {"status": "warn", "state": "read_only"}
    wait_until = time.monotonic() + RECOVERY
    while site.fetch("POST", "/items", json={"name": "two"}).status_code != 201:
        assert time.monotonic() < wait_until
        time.sleep(0.02)


def assert_refused(response: httpx.Response) -> None:
    assert response.status_code == 503, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["cache-control"] == "no-store"
    assert int(response.headers["retry-after"]) >= 1
    problem = response.json()
    assert problem["type"] == f"urn:resilientdb:problem:{problem['reason']}"
    assert "127.0.0.1" not in response.text
    assert "item" not in response.text


def seconds(ask: Callable[[], object]) -> float:
    began = time.monotonic()
    ask()
    return time.monotonic() - began
