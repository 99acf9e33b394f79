"""Runs a command that must not outlive its starter: `python leash.py COMMAND ARGUMENT ...`.

Standard input is the leash. When it closes, because the starter closed it or died of anything,
`kill -9` included, the command's whole process group is ended: asked first, killed after ten
seconds. Run as a file, so that nothing of loralab is imported.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress

PATIENCE = 10.0
"""Seconds between asking a group to end and killing it."""


def main(command: list[str]) -> int:
    """Run the command; its exit code, 127 if it cannot be started."""
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        return 127
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: end(child))
    threading.Thread(target=hold, args=(child,), daemon=True).start()
    code = child.wait()
    # What the command started goes with it.
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    return code if code >= 0 else 128 - code


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
