"""The space of a search: `kd.temperature=1..20:log`, `hard.weight=0..1:step=0.1`, `batch_size=32|64`.

A name is TERM.PARAMETER, for a parameter of a loss given with --loss, or that of a training option.
"""

from collections.abc import Iterator, Sequence
from dataclasses import Field, dataclass, fields, replace
from decimal import Decimal
from typing import Any

from softcache.base.errors import UsageError, unknown_name_error
from softcache.base.spec import parse_number
from softcache.pipeline.losses import Custom, Loss, parse_losses, split_loss_spec
from softcache.pipeline.losses.base import Ramp
from softcache.pipeline.losses.custom_specs import list_own_parameters
from softcache.pipeline.losses.distillation_loss import term_names
from softcache.stages.cli.configs import StudentConfig
from softcache.stages.cli.options import to_flag

Value = bool | int | float | str

# Training options that can be searched. Options that say where a student is trained are not among them, nor is
# --select, by which trials are compared.
TRAINING_OPTIONS = (
    "arch",
    "batch_size",
    "clip_norm",
    "ema",
    "epochs",
    "learning_rate",
    "momentum",
    "optimizer",
    "schedule",
    "warmup",
    "weight_decay",
)


@dataclass(frozen=True)
class SearchedOption:
    """One name that is searched, with its choices or its range.

    Attributes:
        spec: the text on the command line.
        name: the name of the value in the study and in tune.json.
        term_index: position of the loss in --loss, -1 for a training option.
        parameter: the parameter of the loss, or the training option.
        choices: the values, empty for a range.
        low, high: both ends of a range, which belong to it.
        log: sample a range on a logarithmic scale.
        step: distance of the values of a range, 0 where any value may be taken.
    """

    spec: str
    name: str
    term_index: int
    parameter: str
    choices: tuple[Value, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    step: float = 0.0

    def list_bounds(self) -> tuple[Value, ...]:
        """Return all choices, or both ends of the range."""
        return self.choices or (self.low, self.high)

    def list_points(self) -> list[Value]:
        """Return every choice or step, in decimal arithmetic: 0.3 instead of 0.1 + 0.1 + 0.1."""
        if self.choices:
            return list(self.choices)
        low, high, step = (Decimal(repr(x)) for x in (self.low, self.high, self.step))
        return [type(self.low)(low + i * step) for i in range(int((high - low) / step) + 1)]

    def round_to_point(self, value: Value) -> Value:
        """Return the element of list_points() for a value with the rounding errors of Optuna's arithmetic."""
        if self.choices or not self.step:
            return value
        points = self.list_points()
        return points[round((float(value) - self.low) / self.step)]


def parse_space(specs: Sequence[str], config: StudentConfig, explicit: set[str]) -> tuple[SearchedOption, ...]:
    """Parse the values of --search.

    Args:
        specs: the texts.
        config: the options of a student, whose losses are searched.
        explicit: the names of the options that were typed on the command line, which cannot be searched.

    Raises:
        UsageError: for a text or a name that is not valid, or a value that the option does not take.
    """
    if not specs:
        raise UsageError("nothing to search: --search kd.temperature=1..20:log, or --search batch_size=32|64")
    space = tuple(_parse_option(spec, config) for spec in specs)
    names = [option.name for option in space]
    for option in space:
        if names.count(option.name) > 1:
            raise UsageError(f"'{option.name}' is searched twice: one --search for each name")
        if option.term_index < 0 and option.parameter in explicit:
            raise UsageError(f"'{option.name}' is searched: leave out {to_flag(option.parameter)}")
        for value in option.list_bounds():
            _check_value(option, value, config)
    return space


def apply_values(config: StudentConfig, space: Sequence[SearchedOption], values: dict[str, Any]) -> StudentConfig:
    """Return the options of a student with the values of a trial.

    Args:
        config: the other options.
        space: what is searched.
        values: {name: value}. Floats are written into the text of a loss exactly.
    """
    losses = list(config.loss)
    for option in space:
        value = values[option.name]
        if option.term_index < 0:
            config = replace(config, **{option.parameter: value})
        else:
            losses[option.term_index] = _replace_parameter(losses[option.term_index], option.parameter, value)
    return replace(config, loss=tuple(losses))


def _replace_parameter(spec: str, parameter: str, value: Value) -> str:
    name, parameters = split_loss_spec(spec)
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return f"{name}:" + ",".join(f"{k}={v}" for k, v in {**parameters, parameter: text}.items())


def _parse_option(spec: str, config: StudentConfig) -> SearchedOption:
    """Parse one --search: NAME=LOW..HIGH, with :log or :step=S, or NAME=a|b|c."""
    left, _, text = spec.partition("=")
    typed_name = left.strip()
    term_index, parameter, kind = _find_parameter(spec, typed_name, config)
    name = typed_name if term_index >= 0 else parameter
    option = SearchedOption(spec, name, term_index, parameter)
    if "|" in text:
        choices = tuple(_parse_value(spec, name, choice, kind) for choice in text.split("|"))
        if len(set(choices)) < len(choices):
            raise UsageError(f"search '{spec}': a choice is given twice")
        return replace(option, choices=choices)
    if ".." not in text:
        raise UsageError(f"search '{spec}' is not NAME=LOW..HIGH, with :log or :step=S, nor NAME=a|b|c")
    if kind not in (int, float):
        raise UsageError(f"search '{spec}': {name} is not a number: give choices, {name}=a|b")
    return _parse_range(option, text, kind)


def _parse_range(option: SearchedOption, text: str, kind: type) -> SearchedOption:
    """Parse LOW..HIGH with :log, :step=S or neither. Integers have a step of 1 by default."""
    spec, name = option.spec, option.name
    ends, *suffixes = text.split(":")
    low_text, _, high_text = ends.partition("..")
    low, high = (_parse_number(spec, name, end, kind) for end in (low_text, high_text))
    if low >= high:
        raise UsageError(f"search '{spec}': {low} is not below {high}: the range is empty")
    log = "log" in suffixes
    steps = [suffix.removeprefix("step=") for suffix in suffixes if suffix.startswith("step=")]
    if len(suffixes) != log + len(steps) or len(suffixes) > 1:
        raise UsageError(f"search '{spec}': after the range comes :log, or :step=S, or nothing")
    if log and low <= 0:
        raise UsageError(f"search '{spec}': a logarithmic range begins above 0, not at {low}")
    if not steps:
        step = 1 if kind is int and not log else 0.0
        return replace(option, low=low, high=high, log=log, step=step)
    step = _parse_number(spec, "step", steps[0], kind)
    if not 0 < step <= high - low:
        raise UsageError(f"search '{spec}': a step of {step} does not fit between {low} and {high}")
    option = replace(option, low=low, high=high, log=log, step=step)
    return replace(option, high=kind(option.list_points()[-1]))


def _find_parameter(spec: str, name: str, config: StudentConfig) -> tuple[int, str, type]:
    """Find what a name stands for.

    Returns:
        The position of its loss in --loss, -1 for a training option; the name of the parameter or option; and its
        type: str, bool, int or float.
    """
    losses = parse_losses(config.loss)
    terms = term_names(losses)
    term, dot, parameter = name.rpartition(".")
    if not dot:
        training_option = name.replace("-", "_")
        if training_option not in TRAINING_OPTIONS:
            raise unknown_name_error("setting to search", name, [*TRAINING_OPTIONS, *_list_parameters(config, losses)])
        return -1, training_option, type(_get_field(training_option).default)
    if term not in terms:
        raise unknown_name_error("loss to search", term, terms)
    term_index = terms.index(term)
    loss = losses[term_index]
    types = _get_types(loss, config.loss[term_index])
    if parameter not in types:
        raise unknown_name_error(f"parameter of loss '{term}'", parameter, types)
    if isinstance(getattr(loss, parameter, None), Ramp):
        raise UsageError(
            f"search '{spec}': {parameter} is a ramp in --loss '{config.loss[term_index]}': remove one of the two"
        )
    return term_index, parameter, types[parameter] if types[parameter] in (str, bool, int) else float


def _list_parameters(config: StudentConfig, losses: Sequence[Loss]) -> Iterator[str]:
    for term, loss, spec in zip(term_names(losses), losses, config.loss, strict=True):
        yield from (f"{term}.{parameter}" for parameter in _get_types(loss, spec))


def _get_types(loss: Loss, spec: str) -> dict[str, Any]:
    """Return {parameter: type} of a loss; spec: its text in --loss."""
    if isinstance(loss, Custom):
        return dict(list_own_parameters(spec))
    return {f.name: f.type for f in fields(loss)}  # type: ignore[arg-type]


def _get_field(name: str) -> Field[Any]:
    return next(f for f in fields(StudentConfig) if f.name == name)


def _parse_value(spec: str, name: str, text: str, kind: type) -> Value:
    if kind is str:
        if not text:
            raise UsageError(f"search '{spec}': a choice is empty")
        return text
    if kind is bool:
        if text not in ("true", "false"):
            raise UsageError(f"search '{spec}': {name}={text} is neither true nor false")
        return text == "true"
    return _parse_number(spec, name, text, kind)


def _parse_number(spec: str, name: str, text: str, kind: type) -> float:
    value = parse_number(spec, "search", name, text)
    if kind is int and value != int(value):
        raise UsageError(f"search '{spec}': {name}={text} is not an integer")
    return int(value) if kind is int else value


def _check_value(option: SearchedOption, value: Value, config: StudentConfig) -> None:
    """Check a value as the command line would.

    Raises:
        UsageError: when the option or the parameter of the loss does not take it.
    """
    if option.term_index >= 0:
        try:
            parse_losses(apply_values(config, (option,), {option.name: value}).loss)
        except UsageError as error:
            raise UsageError(f"search '{option.spec}': {error}") from None
        return
    limits = _get_field(option.parameter).metadata
    if "choices" in limits and value not in limits["choices"]:
        raise unknown_name_error(option.parameter, str(value), limits["choices"])
    if not isinstance(value, str) and "least" in limits and value < limits["least"]:
        raise UsageError(f"search '{option.spec}': {option.parameter} {value} is below {limits['least']}")
    if not isinstance(value, str) and "most" in limits and value > limits["most"]:
        raise UsageError(f"search '{option.spec}': {option.parameter} {value} is above {limits['most']}")
