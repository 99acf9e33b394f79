"""The error a user can mend: the command line prints its one line and exits with 2."""


class UserError(Exception):
    """Names the thing, the value, what was expected and what to do, in one line."""
