"""What a user did or must mend: the one error that ends a command without a traceback."""


class InputError(ValueError):
    """Bad input or a state that the user must mend; the message names the remedy.

    The command prints it and ends with exit code 2.
    """


class NotYetError(InputError):
    """What a step builds on is not there yet: an earlier step has to run first."""
