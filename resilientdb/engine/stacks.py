"""Where a connection was checked out: remembered at little cost, and put into words when somebody asks."""

from __future__ import annotations

import sys
import traceback
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import CodeType, FrameType

__all__ = ["Place", "here", "in_words"]

Place = list[tuple["CodeType", int]]
"""Code and line of each call, innermost first. Neither keeps a variable of the program's alive."""


def here(skip: int = 0) -> Place:
    """The stack of whoever calls, without the innermost ``skip`` frames.

    An asynchronous engine works in a greenlet, which has a stack of its own: those of its parents, where whoever
    awaits it stands, follow.
    """
    place: Place = []
    frame: FrameType | None = sys._getframe(1 + skip)  # noqa: SLF001
    greenlets: Any = sys.modules.get("greenlet")  # not there: nobody uses it
    parent = greenlets.getcurrent().parent if greenlets is not None else None
    while frame is not None:
        place.append((frame.f_code, frame.f_lineno))
        frame = frame.f_back
        if frame is None and parent is not None:
            frame, parent = parent.gr_frame, parent.parent
    return place


def in_words(place: Place) -> tuple[str, ...]:
    """As ``traceback.format_stack`` has it, innermost last."""
    calls = [(code.co_filename, line, code.co_name, None) for code, line in reversed(place)]
    return tuple(traceback.StackSummary.from_list(calls).format())
