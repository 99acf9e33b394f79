"""Runs a command that must not outlive its starter: `python leash.py COMMAND ARGUMENT ...`.

Standard input is the leash. When it closes, because the starter closed it or died of anything,
`kill -9` included, the command's whole process group is ended: asked first, killed after ten
seconds. Signals do not end it: those that a terminal or a scheduler sends to all are the starter's
to answer, which may have work to finish with the command. If it is killed itself, the kernel kills
the command (on Linux). Run as a file, so that nothing of loralab is imported.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress

PATIENCE = 10.0
"""Seconds between asking a group to end and killing it."""
_PR_SET_PDEATHSIG = 1


def main(command: list[str]) -> int:
    """Run the command; its exit code, 127 if it cannot be started."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):
        # A handler, which the command does not inherit as it would SIG_IGN.
        signal.signal(number, lambda *_: None)
    try:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_die_with_parent
        )
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        return 127
    threading.Thread(target=hold, args=(child,), daemon=True).start()
    code = child.wait()
    # What the command started goes with it.
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    return code if code >= 0 else 128 - code


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def hold(child: subprocess.Popen[bytes]) -> None:
    """End the child once nobody holds the other end of the leash."""
    while os.read(0, 4096):
        pass
    end(child)


def end(child: subprocess.Popen[bytes]) -> None:
    """Ask the child's group to end, and see to it."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        with suppress(subprocess.TimeoutExpired):
            child.wait(PATIENCE)
            return


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
