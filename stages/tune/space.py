"""What a search changes: `kd.temperature=1..20:log`, `hard.weight=0..1:step=0.1`, `batch_size=32|64`.

A name is that of a loss's knob, of a term that --loss gives, or that of a training setting.
"""

from collections.abc import Iterator, Sequence
from dataclasses import Field, dataclass, fields, replace
from decimal import Decimal
from typing import Any

from softcache.base.errors import UsageError, unknown_name_error
from softcache.base.spec import parse_number, parse_spec
from softcache.pipeline.losses import Loss, parse_losses
from softcache.pipeline.losses.base import Ramp
from softcache.pipeline.losses.distillation_loss import term_names
from softcache.stages.cli.configs import StudentConfig
from softcache.stages.cli.options import to_flag

Value = bool | int | float | str

# Settings that are the student's training. Not among them: what says where it is done, and --select, by which
# trials are compared.
SETTINGS = (
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
    """One name of the search: its choices, or low … high with both ends. spec: as the command said it; term: the
    position of its loss in --loss, -1 for a setting; step: 0 where any value may be taken."""

    spec: str
    name: str
    term: int
    knob: str
    choices: tuple[Value, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    step: float = 0.0

    def ends(self) -> tuple[Value, ...]:
        """The values between which all others are."""
        return self.choices or (self.low, self.high)

    def points(self) -> list[Value]:
        """Every value of choices or steps, decimal: 0.3 and not 0.1 + 0.1 + 0.1."""
        if self.choices:
            return list(self.choices)
        low, high, step = (Decimal(repr(x)) for x in (self.low, self.high, self.step))
        return [type(self.low)(low + i * step) for i in range(int((high - low) / step) + 1)]

    def decimal(self, value: Value) -> Value:
        """A value as Optuna's arithmetic has it -> the one of points() that it stands for."""
        if self.choices or not self.step:
            return value
        points = self.points()
        return points[round((float(value) - self.low) / self.step)]


def parse_space(specs: Sequence[str], config: StudentConfig, said: set[str]) -> tuple[SearchedOption, ...]:
    """What --search says, of the losses of these settings. Raises UsageError for what cannot be searched.

    said: the settings that the command fixes.
    """
    if not specs:
        raise UsageError("nothing to search: --search kd.temperature=1..20:log, or --search batch_size=32|64")
    space = tuple(_parse_search(spec, config) for spec in specs)
    for one in space:
        if [other.name for other in space].count(one.name) > 1:
            raise UsageError(f"'{one.name}' is searched twice: one --search for each name")
        if one.term < 0 and one.knob in said:
            raise UsageError(f"'{one.name}' is searched: leave out {to_flag(one.knob)}")
        for value in one.ends():
            _check_limits(one, value, config)
    return space


def apply_values(config: StudentConfig, space: Sequence[SearchedOption], values: dict[str, Any]) -> StudentConfig:
    """The settings of a student with values, {name: value}, in their places. Floats are written exactly."""
    losses = list(config.loss)
    for one in space:
        if one.term < 0:
            config = replace(config, **{one.knob: values[one.name]})
        else:
            losses[one.term] = _with_knob(losses[one.term], one.knob, values[one.name])
    return replace(config, loss=tuple(losses))


def _with_knob(spec: str, knob: str, value: Value) -> str:
    name, given = parse_spec(spec, "loss")
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return f"{name}:" + ",".join(f"{k}={v}" for k, v in {**given, knob: text}.items())


def _parse_search(spec: str, config: StudentConfig) -> SearchedOption:
    said, _, text = spec.partition("=")
    term, knob, kind = _target(spec, said.strip(), config)
    name = said.strip() if term >= 0 else knob
    if "|" in text:
        choices = tuple(_value(spec, name, part, kind) for part in text.split("|"))
        if len(set(choices)) < len(choices):
            raise UsageError(f"search '{spec}': a choice is given twice")
        return SearchedOption(spec, name, term, knob, choices)
    if ".." not in text:
        raise UsageError(f"search '{spec}' is not NAME=LOW..HIGH, with :log or :step=S, nor NAME=a|b|c")
    if kind not in (int, float):
        raise UsageError(f"search '{spec}': {name} is no number: give choices, {name}=a|b")
    return _range(SearchedOption(spec, name, term, knob), text, kind)


def _range(one: SearchedOption, text: str, kind: type) -> SearchedOption:
    spec, name = one.spec, one.name
    body, *more = text.split(":")
    low_text, _, high_text = body.partition("..")
    low, high = (_number(spec, name, part, kind) for part in (low_text, high_text))
    if low >= high:
        raise UsageError(f"search '{spec}': {low} is not below {high}, so there is nothing between them")
    log = "log" in more
    steps = [part.removeprefix("step=") for part in more if part.startswith("step=")]
    if len(more) != log + len(steps) or len(more) > 1:
        raise UsageError(f"search '{spec}': after the range comes :log, or :step=S, or nothing")
    if log and low <= 0:
        raise UsageError(f"search '{spec}': a logarithmic range begins above 0, not at {low}")
    step = _number(spec, "step", steps[0], kind) if steps else 1 if kind is int and not log else 0.0
    if steps and not 0 < step <= high - low:
        raise UsageError(f"search '{spec}': a step of {step} does not fit between {low} and {high}")
    stepped = replace(one, low=low, high=high, log=log, step=step)
    return replace(stepped, high=kind(stepped.points()[-1])) if steps else stepped


def _target(spec: str, name: str, config: StudentConfig) -> tuple[int, str, type]:
    """Which loss, -1 for none, which knob, and of what kind it is: str, bool, int or float."""
    losses = parse_losses(config.loss)
    terms = term_names(losses)
    term, dot, knob = name.rpartition(".")
    if not dot:
        setting = name.replace("-", "_")
        if setting not in SETTINGS:
            raise unknown_name_error("setting to search", name, [*SETTINGS, *_knobs_of(losses)])
        return -1, setting, type(_setting(setting).default)
    if term not in terms:
        raise unknown_name_error("loss to search", term, terms)
    loss = losses[terms.index(term)]
    kinds: dict[str, Any] = {f.name: f.type for f in fields(loss)}  # type: ignore[arg-type]
    if knob not in kinds:
        raise unknown_name_error("parameter", knob, kinds, owner=f"loss '{term}'")
    if isinstance(getattr(loss, knob), Ramp):
        given = config.loss[terms.index(term)]
        raise UsageError(f"search '{spec}': {knob} is a ramp in --loss '{given}': take one or the other away")
    return terms.index(term), knob, kinds[knob] if kinds[knob] in (str, bool, int) else float


def _knobs_of(losses: Sequence[Loss]) -> Iterator[str]:
    for term, loss in zip(term_names(losses), losses, strict=True):
        yield from (f"{term}.{f.name}" for f in fields(loss))  # type: ignore[arg-type]


def _setting(name: str) -> Field[Any]:
    return next(f for f in fields(StudentConfig) if f.name == name)


def _value(spec: str, name: str, text: str, kind: type) -> Value:
    if kind is str:
        if not text:
            raise UsageError(f"search '{spec}': a choice is empty")
        return text
    if kind is bool:
        if text not in ("true", "false"):
            raise UsageError(f"search '{spec}': {name}={text} is neither true nor false")
        return text == "true"
    return _number(spec, name, text, kind)


def _number(spec: str, name: str, text: str, kind: type) -> float:
    value = parse_number(spec, "search", name, text)
    if kind is int and value != int(value):
        raise UsageError(f"search '{spec}': {name}={text} is not a whole number")
    return int(value) if kind is int else value


def _check_limits(one: SearchedOption, value: Value, config: StudentConfig) -> None:
    """Raise UsageError for a value that the command line would not take."""
    if one.term >= 0:
        try:
            parse_losses(apply_values(config, (one,), {one.name: value}).loss)
        except UsageError as error:
            raise UsageError(f"search '{one.spec}': {error}") from None
        return
    limits = _setting(one.knob).metadata
    if "choices" in limits and value not in limits["choices"]:
        raise unknown_name_error(one.knob, str(value), limits["choices"])
    if not isinstance(value, str) and "least" in limits and value < limits["least"]:
        raise UsageError(f"search '{one.spec}': {one.knob} {value} is below {limits['least']}")
    if not isinstance(value, str) and "most" in limits and value > limits["most"]:
        raise UsageError(f"search '{one.spec}': {one.knob} {value} is above {limits['most']}")
