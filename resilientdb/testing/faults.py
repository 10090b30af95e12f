"""Faults as scoped blocks: active when the block starts, still active when it ends, always healed.

::

    with faults.hang(proxy):
        ...  # the database is silent

=====================  =====================================  =====================================
block                  how                                    what the client sees
=====================  =====================================  =====================================
``down``               proxy disabled                         sessions cut, new ones refused
``dead``               server stopped behind a live proxy     sessions cut, new ones accepted, closed
``hang``               timeout 0 both ways                    silence; healing cuts the sessions
``pause``              bandwidth 0 both ways                  silence; healing delivers all of it late
``latency``            latency                                replies come later
``reset``              reset_peer both ways                   RST at the next byte, and for new ones
``reply_lost``         limit_data 0 downstream                request arrives, its reply never does
``request_lost``       limit_data 0 upstream                  request never arrives
``slow_link``          bandwidth both ways                    large results take long
``slow_close``         slow_close                             closing takes long
``sliced``             slicer both ways                       data in small pieces
=====================  =====================================  =====================================

Each block reads the server back at its entry and its exit. Where an effect can be seen without
touching the clients' connections, a connection of its own looks for it too: a question that any
PostgreSQL answers at once must not be answered (in time). That question runs beside the block for
at most 0.25 s, so it costs the block nothing but a wait of that length if the block is shorter.
A fault that is not there is :class:`~.errors.FaultNotActive`: what the test saw then proves
nothing. If the body raised, its error is the one that is seen, with a note. Blocks may be nested.

The blocks are synchronous and take a few milliseconds each way, also in async code.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from typing import TYPE_CHECKING, Literal

from resilientdb.testing import wire
from resilientdb.testing.errors import FaultNotActive, TestingError
from resilientdb.testing.toxics import Stream, ToxicType, milliseconds
from resilientdb.testing.wire import Answer, Probe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from resilientdb.testing.mariadb import MariaDB
    from resilientdb.testing.postgres import Postgres
    from resilientdb.testing.toxiproxy import Proxy, Toxic

__all__ = [
    "ActiveFault",
    "commit_lost",
    "dead",
    "down",
    "hang",
    "latency",
    "pause",
    "promote",
    "reply_lost",
    "request_lost",
    "reset",
    "slow_close",
    "slow_link",
    "sliced",
]

_WINDOW = 0.25  # seconds that a proof listens at most
_BOTH: tuple[Stream, ...] = ("upstream", "downstream")


class ActiveFault:
    """A fault in force. ``check()`` raises :class:`FaultNotActive` if it no longer is."""

    def __init__(self, name: str, check: Callable[[], None]) -> None:
        self.name = name
        self.started_at = time.monotonic()
        self._check = check

    def check(self) -> None:
        """Read the server back now."""
        self._check()

    @property
    def seconds(self) -> float:
        """For how long it has been in force."""
        return time.monotonic() - self.started_at

    def __repr__(self) -> str:
        return f"<ActiveFault {self.name} for {self.seconds:.3f} s>"


# ---------------------------------------------------------------------------------- refused, cut, silent


@contextlib.contextmanager
def down(proxy: Proxy) -> Iterator[ActiveFault]:
    """Cut every connection and refuse new ones. A proxy that was disabled before stays so afterwards."""
    _let_proofs_end(proxy)
    was_enabled = proxy.enabled

    def check() -> None:
        if proxy.enabled:
            raise FaultNotActive(f"down: {proxy!r} is enabled")

    heal = proxy.enable if was_enabled else _nothing
    with _scope("down", proxy.disable, check, heal, proof=_Proof(proxy, _accepted)) as fault:
        yield fault


@contextlib.contextmanager
def dead(
    postgres: Postgres | MariaDB,
    *,
    proxy: Proxy | None = None,
    mode: Literal["fast", "immediate"] = "immediate",
) -> Iterator[ActiveFault]:
    """Stop the server behind a proxy that lives: connections are accepted and then closed.

    Another error than a refusal in most drivers. Healing starts the server again. Without
    ``proxy`` it is a plain outage of the server, and nothing but the server is checked.
    """

    def check() -> None:
        if postgres.running:
            raise FaultNotActive(f"dead: {postgres!r} runs")
        if proxy is not None and not proxy.enabled:
            raise FaultNotActive(f"dead: {proxy!r} is disabled, so connections are refused, not accepted")

    if not postgres.running:
        raise FaultNotActive(f"dead: {postgres!r} does not run in the first place")
    proof = None if proxy is None else _Proof(proxy, _replied)
    with _scope("dead", lambda: postgres.stop(mode), check, postgres.start, proof=proof) as fault:
        yield fault


def hang(proxy: Proxy, *, toxicity: float = 1.0) -> contextlib.AbstractContextManager[ActiveFault]:
    """Silence both ways, for idle, busy and new connections. Healing closes those that it held."""
    return _toxics("hang", proxy, "timeout", {"timeout": 0}, toxicity=toxicity, disproof=_replied)


def pause(
    proxy: Proxy, *, streams: Sequence[Stream] = _BOTH, toxicity: float = 1.0
) -> contextlib.AbstractContextManager[ActiveFault]:
    """Hold all data back; healing delivers it, late and in full, even from clients that have gone.

    As a stalled machine does. Upstream alone makes zombies: requests that arrive after the
    client's retry.
    """
    return _toxics(
        "pause", proxy, "bandwidth", {"rate": 0}, streams=streams, toxicity=toxicity, disproof=_replied
    )


def reset(proxy: Proxy, *, toxicity: float = 1.0) -> contextlib.AbstractContextManager[ActiveFault]:
    """Reset connections (RST): those in use at once, idle ones and new ones at their next byte."""
    return _toxics("reset", proxy, "reset_peer", {"timeout": 0}, toxicity=toxicity, disproof=_replied)


def reply_lost(proxy: Proxy) -> contextlib.AbstractContextManager[ActiveFault]:
    """The next request on each connection is executed and its reply lost; the connection is closed.

    Entered just before a COMMIT: it is committed, and the client cannot know.
    """
    return _toxics(
        "reply_lost", proxy, "limit_data", {"bytes": 0}, streams=("downstream",), disproof=_replied
    )


def request_lost(proxy: Proxy) -> contextlib.AbstractContextManager[ActiveFault]:
    """The next request on each connection never arrives; the connection is closed.

    Entered just before a COMMIT: it is rolled back, and the client cannot know. It sees the very
    same error as in :func:`reply_lost`.
    """
    return _toxics(
        "request_lost", proxy, "limit_data", {"bytes": 0}, streams=("upstream",), disproof=_replied
    )


commit_lost = request_lost
"""The name of :func:`request_lost` where the request is a COMMIT."""


# ------------------------------------------------------------------------------------------------- slow


def latency(
    proxy: Proxy,
    seconds: float,
    jitter: float = 0.0,
    *,
    stream: Stream = "downstream",
    toxicity: float = 1.0,
) -> contextlib.AbstractContextManager[ActiveFault]:
    """Delay data by ``seconds`` ± ``jitter`` in one direction, so once a round trip."""
    attributes = {"latency": milliseconds(seconds, "seconds"), "jitter": milliseconds(jitter, "jitter")}
    least = seconds - jitter
    disproof = functools.partial(_replied_before, least=least) if least > 0 else None
    return _toxics(
        "latency", proxy, "latency", attributes, streams=(stream,), toxicity=toxicity, disproof=disproof
    )


def slow_link(
    proxy: Proxy, kilobytes_per_second: int = 10, *, toxicity: float = 1.0
) -> contextlib.AbstractContextManager[ActiveFault]:
    """Limit each connection to so many KB/s each way; 0 would be a :func:`pause`."""
    if kilobytes_per_second < 1:
        raise ValueError(f"kilobytes_per_second={kilobytes_per_second!r} must be 1 or more")
    return _toxics("slow_link", proxy, "bandwidth", {"rate": kilobytes_per_second}, toxicity=toxicity)


def slow_close(proxy: Proxy, seconds: float) -> contextlib.AbstractContextManager[ActiveFault]:
    """Delay the closing of a connection, seen from either side."""
    return _toxics("slow_close", proxy, "slow_close", {"delay": milliseconds(seconds, "seconds")})


def sliced(
    proxy: Proxy, *, average: int = 8, variation: int = 7, delay: float = 0.0
) -> contextlib.AbstractContextManager[ActiveFault]:
    """Cut data into pieces of ``average`` ± ``variation`` bytes, ``delay`` seconds apart."""
    attributes = {"average_size": average, "size_variation": variation, "delay": round(delay * 1_000_000)}
    return _toxics("sliced", proxy, "slicer", attributes)


# -------------------------------------------------------------------------------------------- failover


def promote(standby: Postgres) -> float:
    """Promote a standby and prove it; returns the seconds that it took. Not a block: there is no way back.

    The old primary goes on unless it is stopped or cut off: combine with :func:`down` or
    :func:`hang` on its proxy.
    """
    if not standby.in_recovery():
        raise FaultNotActive(f"promote: {standby!r} is no standby")
    seconds = standby.promote()
    if standby.in_recovery():
        raise FaultNotActive(f"promote: {standby!r} is still a standby")
    return seconds


# ---------------------------------------------------------------------------------------------- inside


def _nothing() -> None:
    """Heal nothing."""


class _Proof:
    """A question to the proxy in a thread beside the block, and which answer to it disproves the fault.

    Beside, so that neither the block nor an event loop waits; the thread ends by itself in _WINDOW.
    Only an answer that the fault would have prevented counts: a connection that is cut where it
    should be silent may well be the work of another fault nested in this one.
    """

    def __init__(self, proxy: Proxy, disproof: Callable[[Probe], bool]) -> None:
        self._proxy = proxy
        self._disproof = disproof
        self._probe: Probe | None = None  # written by the thread, read after it was joined
        self._thread = threading.Thread(target=self._run, name="resilientdb-fault-proof", daemon=True)

    def start(self) -> None:
        _running.add(self)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._probe = wire.ask(self._proxy.listen_host, self._proxy.listen_port, wait=_WINDOW)
        finally:
            _running.discard(self)

    def is_of(self, proxy: Proxy) -> bool:
        return self._proxy is proxy

    def join(self) -> None:
        if self._thread.ident is not None:
            self._thread.join(_WINDOW + 1.0)

    def verdict(self, name: str) -> None:
        self.join()
        if self._probe is not None and self._disproof(self._probe):
            raise FaultNotActive(f"{name}: a connection through {self._proxy!r} was {self._probe}")


_running: set[_Proof] = set()


def _let_proofs_end(proxy: Proxy) -> None:
    """Before the proxy is changed again: Toxiproxy lets delayed data go when another toxic is added."""
    for proof in tuple(_running):
        if proof.is_of(proxy):
            proof.join()


def _accepted(probe: Probe) -> bool:
    return probe.answer is not Answer.REFUSED


def _replied(probe: Probe) -> bool:
    return probe.answer is Answer.REPLIED


def _replied_before(probe: Probe, *, least: float) -> bool:
    return _replied(probe) and probe.seconds < least * 0.95  # the injector's clock has whole milliseconds


@contextlib.contextmanager
def _scope(
    name: str,
    begin: Callable[[], object],
    check: Callable[[], None],
    heal: Callable[[], object],
    *,
    proof: _Proof | None = None,
) -> Iterator[ActiveFault]:
    """The shape of every block: begin, check, run the body, check, and heal whatever happened."""
    try:
        begin()
        check()
        if proof is not None:
            proof.start()
        fault = ActiveFault(name, check)
        try:
            yield fault
        except BaseException as error:
            try:
                check()
            except TestingError as gone:
                error.add_note(f"and the fault was no longer as it was made: {gone}")
            raise
        check()
        if proof is not None:
            proof.verdict(name)
    finally:
        if proof is not None:
            proof.join()
        heal()


@contextlib.contextmanager
def _toxics(
    name: str,
    proxy: Proxy,
    kind: ToxicType,
    attributes: Mapping[str, int],
    *,
    streams: Sequence[Stream] = _BOTH,
    toxicity: float = 1.0,
    disproof: Callable[[Probe], bool] | None = None,
) -> Iterator[ActiveFault]:
    """One toxic in each of the directions, for the length of the block."""
    _let_proofs_end(proxy)
    added: list[Toxic] = []

    def begin() -> None:
        for stream in streams:
            toxic = proxy.add_toxic(kind, stream=stream, toxicity=toxicity, name=None, **attributes)
            added.append(toxic)

    def check() -> None:
        for toxic in added:
            toxic.assert_active()

    def heal() -> None:
        with contextlib.ExitStack() as every:  # one that cannot be removed must not keep the others
            for toxic in added:
                every.callback(toxic.remove, missing_ok=True)

    # One connection proves nothing about a fault that hits a share of them.
    proof = None if disproof is None or toxicity < 1 else _Proof(proxy, disproof)
    with _scope(name, begin, check, heal, proof=proof) as fault:
        yield fault
