"""Why weights cannot be downloaded or converted."""


class WeightsError(Exception):
    """The weights cannot be downloaded or converted; the message says why."""


class ConvertError(WeightsError):
    """The checkpoint cannot be converted; the message says what is wrong with it."""


class UnknownNameError(ConvertError):
    """No directory name tells which checkpoint it is."""


def one_line(exc: BaseException) -> str:
    """The error's text without line breaks; its class's name if it has no text."""
    return " ".join(str(exc).split()) or type(exc).__name__
