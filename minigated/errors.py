"""The one exception for wrong input."""


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one line that names the offending value and what is accepted. The command line prints it as
    ``error: <message>`` and exits with status 2; inside Python it is a ``ValueError`` like any other.
    """


def one_of(what: str, value: object, accepted) -> None:
    """Refuses `value` unless it is one of `accepted`, naming both."""
    if value not in accepted:
        raise InputError(f"unknown {what} {value!r}; accepted: {', '.join(map(str, accepted))}")
