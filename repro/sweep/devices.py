"""Which GPUs of this machine a cell gets: its own, unless cells may share them."""

from __future__ import annotations

import collections
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from repro.errors import UserError
from repro.files import try_lock


@dataclass
class Lent:
    """GPUs for one cell, as CUDA_VISIBLE_DEVICES names them, and the locks that its process has to keep open."""

    names: str = ""
    locks: list[IO[str]] = field(default_factory=list)

    def close(self) -> None:
        """Leave the locks to the cell's process, or the GPUs to others when there is none."""
        for lock in self.locks:
            lock.close()


class Devices:
    """The GPUs of `--gpus`, of which no two cells have the same one at a time.

    A lent GPU is a locked file that the cell's process holds open: it stays lent when the cell outlives its sweep, and
    two sweeps on one machine never lend the same one.

    Args:
        names: comma-separated, as in CUDA_VISIBLE_DEVICES; "" lends nothing to anybody.
        shared: give them out in turn instead, without locks.
    """

    def __init__(self, names: str, shared: bool = False) -> None:
        self._names = collections.deque(filter(None, (name.strip() for name in names.split(","))))
        if len(set(self._names)) < len(self._names):
            raise UserError(f"--gpus {names}: names a device twice (--share_gpus lets cells share)")
        self._shared = shared
        self._folder = Path(tempfile.gettempdir(), f"contranorm-gpus-{os.getuid()}")

    def __len__(self) -> int:
        return len(self._names)

    def lend(self, count: int) -> Lent | None:
        """`count` GPUs, or None when so many are not free now."""
        if not self._names or self._shared:
            chosen = list(self._names)[:count]
            self._names.rotate(-count)
            return Lent(",".join(chosen))
        self._folder.mkdir(mode=0o700, exist_ok=True)
        locks: dict[str, IO[str]] = {}
        for name in self._names:
            if len(locks) < count and (lock := try_lock(self._folder / name.replace("/", "_"))) is not None:
                locks[name] = lock
        lent = Lent(",".join(locks), list(locks.values()))
        if len(locks) == count:
            return lent
        lent.close()
        return None
