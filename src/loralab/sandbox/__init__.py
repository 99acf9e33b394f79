"""Run untrusted Python code, and find out whether it passes tests it cannot touch.

`run(code)` starts the code in a process of its own with no network, no files but its standard
library and shared libraries (read-only) and a temporary folder in memory, no environment, no
privileges, and limits on time, memory, processes, files and output. At the deadline it and all
that it started are killed. On Linux by user namespaces; where there are none it refuses, unless
`unsafe=True`.

A pass cannot be forged. The tests run in another interpreter, in a jail of its own; the code's
functions are called over a socket, and what they return arrives as plain values that are compared
on the tests' side (`judge.py`). The code never sees a test, only the arguments of each call, and
has no way to the pipe that carries the verdict.

What this does not cover:
- The kernel is shared, and no system calls are filtered: a fault of the kernel may let code out.
- Code may know the tests from elsewhere, and answer by a table.
- Timing, cache and CPU side channels, and slowing down the machine within the limits. Memory of
  several processes together is looked at every 20 ms; one process cannot go over it at all.
- Without tests, "finished" is the program's own word: hostile code can make it up.
- An object that is no plain value equals only itself. A function that changes its argument in
  place changes a copy, not the test's own. What the code raises is one class for the tests.
- `unsafe=True` without namespaces: limits, the deadline and the separate verdict remain, but the
  code can read and write whatever you can, use the network, and kill your processes.
"""

from loralab.sandbox.launch import Outcome, Status, run, why_not_isolated

__all__ = ["Outcome", "Status", "run", "why_not_isolated"]
