"""The error type for mistakes that a user can mend."""


class UserError(Exception):
    """A mistake in what the user gave: one line saying what is wrong, where, and what to do.

    The command line prints the message without a traceback and exits with code 2.
    """
