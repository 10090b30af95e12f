"""Ctrl-C at any moment, without a server left behind.

While something is being started, an interruption is only noted and comes afterwards, because between a process's
start and the moment somebody knows how to stop it there must be no gap. While cleaning up, it is ignored.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType, TracebackType

__all__ = ["Interrupts"]

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """SIGINT and SIGTERM become ``KeyboardInterrupt`` in the main thread, once, and never in a held block.

    Restores the handlers at the end. Outside of the main thread it does nothing.
    """

    def __init__(self) -> None:
        self._handlers: dict[signal.Signals, signal._HANDLER] = {}
        self._held = False
        self._pending = False
        self._ignored = False

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """A block that is not interrupted; what came meanwhile comes at its end."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
            if self._pending:
                self.ignore()
                raise KeyboardInterrupt

    def ignore(self) -> None:
        """From now on nothing interrupts: the clean-up must come to its end."""
        self._ignored = True

    def _came(self, _number: int, _frame: FrameType | None) -> None:
        if self._ignored:
            return
        if self._held:
            self._pending = True
            return
        self.ignore()
        raise KeyboardInterrupt

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._came) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
