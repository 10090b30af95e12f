"""How figures are put into words, the same on the terminal and on the page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from resilientdb.cli.demo.load import PATIENCE

if TYPE_CHECKING:
    from resilientdb.cli.demo.verdict import Recovery
    from resilientdb.testing import LedgerReport

__all__ = ["back", "latency", "share", "writes"]


def share(value: float | None) -> str:
    """A share as per cent; never rounded up to 100."""
    if value is None:
        return "-"
    text = f"{value * 100:.1f}"
    return "99.9 %" if text == "100.0" and value < 1 else f"{text} %".replace("100.0", "100")


def latency(seconds: float | None) -> str:
    """A latency; one that reached the clients' patience is a request without an answer."""
    if seconds is None:
        return "-"
    return f"> {PATIENCE:g} s" if seconds >= PATIENCE else f"{seconds * 1000:.0f} ms"


def back(recovery: Recovery | None, *, last: bool) -> str:
    """Time back to normal. ``last``: nothing came after, so what was not seen by then was never seen."""
    if recovery is None:
        return ""
    if recovery.seconds is None:
        return "never" if last else f"> {recovery.watched:.1f} s"
    return "at once" if recovery.seconds == 0 else f"{recovery.seconds:.2f} s"


def writes(report: LedgerReport) -> str:
    """The ledger in a sentence."""
    if report.valid:
        checked = f"{report.acknowledged} acknowledged, each there exactly once"
    else:
        checked = f"{report.acknowledged} acknowledged, but {'; '.join(report.violations())}"
    parts = [checked]
    if report.failed:
        parts.append(f"{report.failed} refused, {len(report.resurrected) or 'none'} of them there")
    if report.unknown:
        parts.append(
            f"{report.unknown} of which the client learned nothing, {report.unknown_present} of them there"
        )
    return "; ".join(parts)
