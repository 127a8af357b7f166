"""Bad input, reported in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(Exception):
    """Something the user gave is wrong: the message says what, where, and what to do, in one line."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))  # one line, whatever the caller pasted in


class Interrupted(SystemExit):
    """The run was asked to stop (SIGTERM, SIGUSR2) and has saved what it needs; exit code 128 + signal."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)


def _out_of_memory(error: Exception) -> bool:
    """True for Python's, torch's CPU allocator's and a GPU's way to say it; torch itself need not be loaded."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "DefaultCPUAllocator" in str(error)
    )


def run_main(main: Callable[[], object]) -> NoReturn:
    """Call `main` and leave the process: 0 when it returns, 2 with one line on a `UserError`, 130 on Ctrl-C.

    `main` may return an exit code; any other return value means success. Other exceptions keep their traceback.
    """
    try:
        result = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; re-running the command resumes from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    except OSError as error:  # disk full, read-only folder, vanished file: the system's reason is the one clear line
        where = f": {error.filename}" if error.filename else ""
        print(f"error: {error.strerror or error}{where}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        print(f"error: out of memory ({reason}): smaller batches or a smaller model need less", file=sys.stderr)
        sys.exit(2)
    sys.exit(result if isinstance(result, int) and not isinstance(result, bool) else 0)
