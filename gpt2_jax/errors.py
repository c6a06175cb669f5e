"""Errors for people: one line that says what was wrong, where, what was expected and what to do."""


class UserError(Exception):
    """Something that the user can put right. Scripts print one line and exit with `exit_code`."""

    exit_code = 1


class UsageError(UserError):
    """A wrong flag, setting or combination of them, found before anything ran."""

    exit_code = 2


class DivergedError(UserError):
    """Training produced a value that is not finite."""

    exit_code = 3
