"""From what became of each request to the figures of one outage. Pure; times are seconds on the monotonic clock."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["FAST", "OK", "Figures", "Request", "figures", "normal_after"]

OK = "ok"
FAST = 0.05
"""Seconds in which a refusal is given."""
_LATEST = 0.1
"""Seconds beyond its deadline by which a request has ended."""
_QUICK = 0.1
"""Seconds in which a request is answered when all is well; the query takes a tenth of it."""
_NORMAL_SHARE = 0.95
_SPAN = 1.0
_STEP = 0.05


@dataclass(frozen=True)
class Request:
    due: float
    ended: float
    """Infinite: it has not."""
    how: str

    @property
    def seconds(self) -> float:
        return self.ended - self.due


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Of one outage. Seconds; None: it never was, or there was nobody to judge by."""

    noticed: float | None
    """From its beginning to the first who came and was refused in ``FAST``."""
    fast: float | None
    """The share that was refused so, of those who came after that and before the end."""
    in_time: float | None
    """The share that was told something by its deadline, and ``_LATEST``, of those who came during the outage."""
    latest: float
    """The longest wait of somebody who came during the outage."""
    stuck: int
    """Most requests at once that were under way for longer than that."""
    in_flight: int
    """Most requests at once."""
    first_ok: float | None
    """From the healing to the first who was served."""
    normal: float | None
    """From the healing to when ``_NORMAL_SHARE`` of those who come within a second are served in ``_QUICK``."""
    served: float
    """Share that was, of those who came after the healing."""
    outcomes: Counter[str]
    """How it ended for those who came during the outage."""


def figures(
    requests: Sequence[Request], broken: float, ended: float, healed: float, until: float, *, deadline: float
) -> Figures:
    """It lasted from ``broken`` to ``ended``; by ``healed`` nothing of it was left. ``until``: the next one, or the
    end of the run."""
    during = [request for request in requests if broken <= request.due < ended]
    after = [request for request in requests if healed <= request.due < until]
    noticed = min((request.due for request in during if _is_refused_fast(request)), default=None)
    since = [request for request in during if noticed is not None and request.due > noticed]
    ok = [request.ended for request in (*during, *after) if request.how == OK and request.ended >= healed]
    patience = deadline + _LATEST
    told = sum(request.seconds <= patience for request in during)
    return Figures(
        noticed=None if noticed is None else noticed - broken,
        fast=sum(map(_is_refused_fast, since)) / len(since) if since else None,
        in_time=told / len(during) if during else None,
        latest=max((min(request.ended, until) - request.due for request in during), default=0.0),
        stuck=_most_at_once([(request.due + patience, request.ended) for request in during]),
        in_flight=_most_at_once([(request.due, request.ended) for request in during]),
        first_ok=min(ok) - healed if ok else None,
        normal=normal_after(after, healed, until),
        served=sum(map(_is_served, after)) / len(after) if after else 0.0,
        outcomes=Counter(request.how or "unfinished" for request in during),
    )


def normal_after(after: Sequence[Request], healed: float, until: float) -> float | None:
    """Seconds from the healing until all was well again; None if it was not before ``until``."""
    for step in range(math.ceil((until - healed) / _STEP)):
        since = healed + step * _STEP
        if since + _SPAN > until:
            return None
        came = [request for request in after if since <= request.due < since + _SPAN]
        if came and sum(map(_is_served, came)) >= _NORMAL_SHARE * len(came):
            return step * _STEP
    return None


def _is_refused_fast(request: Request) -> bool:
    return request.how != OK and request.seconds <= FAST


def _is_served(request: Request) -> bool:
    return request.how == OK and request.seconds <= _QUICK


def _most_at_once(spans: Sequence[tuple[float, float]]) -> int:
    changes = sorted(change for begin, end in spans if begin < end for change in ((begin, 1), (end, -1)))
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most
