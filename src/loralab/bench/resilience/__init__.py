"""`loralab bench resilience`: runs that are killed, starved, damaged and misled, and what is lost.

`world`: the search that is disturbed, and what it comes to undisturbed. `child`, `launcher`: runs
in processes that can be killed. `kills`, `disk`, `damage`, `signals`, `rewards`: the cases. `task`:
the rewards that misbehave. `rows`, `command`: the table and the command line.
"""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """The command. It is imported when it runs: scoring processes import the package too."""
    from loralab.bench.resilience.command import main as run

    return run(argv)
