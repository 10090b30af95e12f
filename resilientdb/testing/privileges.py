"""How a server is run without root's rights. PostgreSQL refuses to start as uid 0.

Not root: nothing to do. Root: a user namespace in which we are nobody (``unshare``) where the
kernel allows it, since then nothing has to be copied or chowned: outside, the files stay root's.
Where it is not allowed (a chroot, many containers), the account ``nobody`` itself.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Privileges", "unprivileged"]

_NOBODY = 65534


@dataclass(frozen=True, slots=True)
class Privileges:
    """The way a command sheds root: put ``prefix`` before it, and run it as ``uid``/``gid`` if set."""

    prefix: tuple[str, ...] = ()
    uid: int | None = None
    gid: int | None = None

    @property
    def switches_user(self) -> bool:
        """Whether files made for the command must be given to another account."""
        return self.uid is not None

    def own(self, folder: Path) -> None:
        """Give a folder and all that is in it to the account the command runs as."""
        if self.uid is None or self.gid is None:
            return
        os.chown(folder, self.uid, self.gid)
        for parent, folders, files in os.walk(folder):
            for name in (*folders, *files):
                os.chown(Path(parent, name), self.uid, self.gid, follow_symlinks=False)


@functools.cache
def unprivileged() -> Privileges:
    """Find out, once a process, how to run a command without root's rights."""
    if os.geteuid() != 0:
        return Privileges()
    unshare = shutil.which("unshare")
    if unshare is not None:
        prefix = (unshare, "--user", f"--map-user={_NOBODY}", f"--map-group={_NOBODY}")
        try:
            probe = subprocess.run(
                [*prefix, "true"], stdin=subprocess.DEVNULL, capture_output=True, timeout=10, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            probe = None
        if probe is not None and probe.returncode == 0:
            return Privileges(prefix=prefix)
    return Privileges(uid=_NOBODY, gid=_nobody_group())


def _nobody_group() -> int:
    import pwd

    try:
        return pwd.getpwuid(_NOBODY).pw_gid
    except KeyError:
        return _NOBODY
