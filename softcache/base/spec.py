"""The grammar of options that choose something with parameters: `name` or `name:parameter=value,parameter=value`."""

from collections.abc import Iterable

from .errors import UsageError, unknown_name_error


def parse_spec(spec: str, kind: str) -> tuple[str, dict[str, str]]:
    """Split `crop:pad=4,mixup=0.2` into ("crop", {"pad": "4", "mixup": "0.2"}).

    Args:
        spec: The text of the option.
        kind: What is chosen, such as "loss", for messages.

    Raises:
        UsageError: A parameter has no value, or is given twice.
    """
    name, _, rest = spec.partition(":")
    parameters: dict[str, str] = {}
    for part in filter(None, rest.split(",")):
        parameter, equals, value = part.partition("=")
        if not equals or not value:
            raise UsageError(f"{kind} '{spec}': '{part}' is not parameter=value")
        if parameter in parameters:
            raise UsageError(f"{kind} '{spec}': '{parameter}' is given twice")
        parameters[parameter] = value
    return name, parameters


def check_parameters(spec: str, kind: str, parameters: Iterable[str], known: Iterable[str]) -> None:
    """Check that what is chosen has these parameters.

    Args:
        spec: The text of the option, for messages.
        kind: What is chosen, for messages.
        parameters: Names of the parameters in the text.
        known: Names of the parameters that exist.

    Raises:
        UsageError: A parameter does not exist; the message lists those that do.
    """
    known = list(known)
    for parameter in parameters:
        if parameter not in known:
            raise unknown_name_error("parameter", parameter, known, owner=f"{kind} '{spec.partition(':')[0]}'")


def parse_number(spec: str, kind: str, parameter: str, text: str) -> float:
    """Parse the value of a parameter as a finite number; spec, kind and parameter are for messages.

    Raises:
        UsageError: The text is not a number, or it is not finite.
    """
    try:
        value = float(text)
    except ValueError:
        raise UsageError(f"{kind} '{spec}': {parameter}={text} is not a number") from None
    if not -1e30 < value < 1e30:
        raise UsageError(f"{kind} '{spec}': {parameter}={text} is not finite")
    return value
