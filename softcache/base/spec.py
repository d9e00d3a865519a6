"""One small grammar for every choice with knobs: `name`, `name:knob=value,knob=value`."""

from collections.abc import Iterable

from .errors import UsageError, unknown_name_error


def parse_spec(spec: str, what: str) -> tuple[str, dict[str, str]]:
    """Split `crop:pad=4,mixup=0.2` into `("crop", {"pad": "4", "mixup": "0.2"})`.

    Raises UsageError for a knob without a value or named twice.
    """
    name, _, rest = spec.partition(":")
    knobs: dict[str, str] = {}
    for part in filter(None, rest.split(",")):
        knob, equals, value = part.partition("=")
        if not equals or not value:
            raise UsageError(f"{what} '{spec}': '{part}' is not knob=value")
        if knob in knobs:
            raise UsageError(f"{what} '{spec}': '{knob}' is given twice")
        knobs[knob] = value
    return name, knobs


def check_parameters(spec: str, what: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise UsageError, naming the knobs there are, when one is given that does not exist."""
    known = list(known)
    for knob in given:
        if knob not in known:
            raise unknown_name_error(f"knob of {what} '{spec.partition(':')[0]}'", knob, known)


def parse_number(spec: str, what: str, knob: str, text: str) -> float:
    """A knob's value as a finite number, or UsageError."""
    try:
        value = float(text)
    except ValueError:
        raise UsageError(f"{what} '{spec}': {knob}={text} is not a number") from None
    if not -1e30 < value < 1e30:
        raise UsageError(f"{what} '{spec}': {knob}={text} is not finite")
    return value
