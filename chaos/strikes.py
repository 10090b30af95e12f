"""One fault after another on a pair of servers, for as long as a block lasts; drawn from a seed."""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Mapping
    from types import TracebackType
    from typing import Literal

    from chaos.pair import Pair
    from resilientdb.testing import Postgres, Proxy
    from resilientdb.testing.toxics import Stream, ToxicType

__all__ = ["Strikes"]

_FIRST: Final = 5
_PAUSE: Final = (0.05, 0.25)
_OF_PAIRS: Final = frozenset({"promotion", "standby restarted"})
_OF_SERVERS: Final = frozenset({"restart", "crash", "crash of a backend"})
"""What a base backup would not survive: one has to come to its end."""
_REBUILT: Final = 90.0
"""Seconds in which a standby has to be there again."""


class Strikes:
    """The faults: first some lost replies, which naive retries double, then one of each kind, then as it comes.

    What is struck is the primary of the moment, or the ``proxies`` (by server) in front of it. A primary that was
    lost is rebuilt as the standby of the other one while the faults go on; until it is one, and again holds what is
    acknowledged, there is no next promotion.
    """

    def __init__(
        self, rng: random.Random, pair: Pair, proxies: Mapping[Postgres, Proxy], application: str
    ) -> None:
        self._rng = rng
        self._pair = pair
        self._proxies = proxies
        self._application = application
        self._stop = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._go, name="chaos-strikes", daemon=True)
        self._rebuilding: threading.Thread | None = None
        self._copied = threading.Event()
        self._copied.set()
        self.counts: Counter[str] = Counter()
        self.complete = threading.Event()
        """Set when there was each kind of fault, or there will be no more."""
        self._kinds: dict[str, tuple[int, Callable[[], object]]] = {
            "reply lost": (3, lambda: self._toxic("limit_data", "downstream", 0.03, bytes=0)),
            "request lost": (3, lambda: self._toxic("limit_data", "upstream", 0.03, bytes=0)),
            "request cut short": (1, lambda: self._toxic("limit_data", "upstream", 0.03, bytes=3)),
            "reset": (2, lambda: self._toxic("reset_peer", "downstream", 0.02, timeout=0)),
            "replies silenced, then cut": (2, lambda: self._toxic("timeout", "downstream", 0.15, timeout=0)),
            "requests silenced, then cut": (2, lambda: self._toxic("timeout", "upstream", 0.15, timeout=0)),
            "late requests": (2, lambda: self._toxic("bandwidth", "upstream", 0.2, rate=0)),
            "late replies": (2, lambda: self._toxic("bandwidth", "downstream", 0.2, rate=0)),
            "backend terminated": (3, self._terminate),
            "restart": (1, lambda: self._pair.primary.restart(self._rng.choice(["fast", "immediate"]))),
            "crash of a backend": (1, lambda: self._pair.primary.crash("backend")),
            "crash": (1, self._crash),
            "standby restarted": (1, self._restart_standby),
            "promotion": (2, self._fail_over),
        }

    @property
    def missing(self) -> list[str]:
        """The kinds that there were none of."""
        return [name for name in self._kinds if not self.counts[name]]

    def __enter__(self) -> Strikes:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        if self._rebuilding is not None:
            self._rebuilding.join()
        if self._failure is not None and error is None:
            raise self._failure

    def _go(self) -> None:
        try:
            self._strike_until_stopped()
        except Exception as error:  # noqa: BLE001 - raised where it is seen
            self._failure = self._failure or error
        finally:
            self.complete.set()

    def _strike_until_stopped(self) -> None:
        names, weights = [*self._kinds], [weight for weight, _ in self._kinds.values()]
        due = [*self._rng.sample(names, len(names)), *["reply lost"] * _FIRST]
        while not self._stop.wait(self._rng.uniform(*_PAUSE)):
            if not self.missing:
                self.complete.set()
            name = due.pop() if due else self._rng.choices(names, weights)[0]
            if self._is_rebuilding() and (
                name in _OF_PAIRS or (name in _OF_SERVERS and not self._copied.is_set())
            ):
                if not self.complete.is_set():
                    due.insert(0, name)
                continue
            self._kinds[name][1]()
            self.counts[name] += 1

    def _toxic(self, kind: ToxicType, stream: Stream, seconds: float, **attributes: int) -> None:
        toxicity = 1.0 if self.counts.total() < _FIRST else self._rng.choice([0.3, 0.6, 1.0])
        proxy = self._proxies[self._pair.primary]
        with proxy.toxic(kind, stream=stream, toxicity=toxicity, name=None, **attributes):
            self._stop.wait(seconds)

    def _terminate(self) -> None:
        """Two of those at work; also while they wait for the standby."""
        self._pair.primary.query(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = %s "
            "AND xact_start IS NOT NULL ORDER BY md5(pid::text || %s) LIMIT 2",
            [self._application, str(self._rng.random())],
        )

    def _crash(self) -> None:
        self._pair.primary.crash("main")
        self._pair.primary.start()

    def _restart_standby(self) -> None:
        """Until it is back, every COMMIT waits."""
        self._pair.standby.restart()

    def _fail_over(self) -> None:
        how: Literal["immediate", "main"] = self._rng.choice(["immediate", "main"])
        self._pair.fail_over(how, after=self._rng.uniform(0.0, 0.3))
        self._copied.clear()
        self._rebuilding = threading.Thread(target=self._rebuild, name="chaos-rebuild", daemon=True)
        self._rebuilding.start()

    def _is_rebuilding(self) -> bool:
        return self._rebuilding is not None and self._rebuilding.is_alive()

    def _rebuild(self) -> None:
        until = time.monotonic() + _REBUILT
        try:
            self._persist(self._pair.copy, until)
            self._copied.set()
            self._persist(self._pair.couple, until)
        except Exception as error:  # noqa: BLE001 - raised where it is seen
            self._failure = error
            self._stop.set()

    def _persist(self, step: Callable[[], object], until: float) -> None:
        """Its primary may just be down."""
        while True:
            try:
                step()
            except Exception:
                if time.monotonic() > until:
                    raise
                time.sleep(0.1)
            else:
                return
