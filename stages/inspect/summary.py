"""What `softcache inspect` prints: the tables of taps, calibration and temperatures."""

from typing import Any

from softcache.base.errors import make_printable
from softcache.stages.cli.console import Console

_LISTED = 5  # pairs of classes, and channels of a tap
_JOINT = "all taps together"


def print_findings(record: dict[str, Any], console: Console) -> None:
    """Print the tables of inspect.json, each with what it means.

    Args:
        record: inspect.json.
        console: Where to print.
    """
    if record["no_taps"]:
        console.print(record["no_taps"])
    else:
        _print_taps(record, console)
    if record["calibration"]:
        _print_calibration(record["calibration"], console)
        _print_similar_classes(record, console)
    else:
        console.print("the held-out rows have no labels: no calibration, no similarity of classes")
    _print_temperatures(record["soft_targets"], console)
    console.print()


def _describe_sample(rows: int, split_rows: int, name: str) -> str:
    if rows == split_rows:
        return f"all {split_rows:,} {name}"
    return f"a random sample of {rows:,} of {split_rows:,} {name}"


def _print_taps(record: dict[str, Any], console: Console) -> None:
    taps, joint = record["taps"], record["joint"]
    train = _describe_sample(joint["train_rows"], joint["train_of"], "training rows")
    held_out = _describe_sample(joint["rows"], joint["of"], f"rows of {joint['split']}")
    console.print(f"Linear probes, trained on {train} of draw 0, measured on {held_out}:")
    if classes := joint["classes_without_rows"]:
        console.print(f"({len(classes)} classes have no rows in {joint['split']}: n/a, and left out of macro F1)")
    width = max(len(_JOINT), *(len(make_printable(tap)) for tap in taps))
    console.print(f"{'tap':<{width}}  accuracy  macro F1  importance (mean ± sd)  columns")
    for name, tap in taps.items():
        importance = f"{tap['importance']['mean']:.4f} ± {tap['importance']['sd']:.4f}"
        columns = f"{tap['columns']:,}, {tap['form']}"
        console.print(f"{make_printable(name):<{width}}{_format_metrics(tap)}  {importance:<22}  {columns}")
    console.print(f"{_JOINT:<{width}}{_format_metrics(joint)}")
    console.print(f"{'teacher':<{width}}{joint['teacher']:>10.4f}")
    console.print(f"{'largest class':<{width}}{joint['majority']:>10.4f}")
    console.print(
        "(importance: accuracy that the probe of all taps loses when one tap is permuted; taps with the same"
        " information share it)"
    )
    if names := [name for name, probe in {**taps, _JOINT: joint}.items() if not probe["converged"]]:
        console.print(f"(not converged: {make_printable(', '.join(names))}; a linear probe can be slightly better)")
    for name, channels in record["channels"].items():
        important = ", ".join(f"{c['channel']} ({c['mean']:.4f})" for c in channels[:_LISTED] if c["mean"] > 0)
        important = important or "none, no single channel is necessary"
        console.print(f"most important channels of {make_printable(name)} in its own probe: {important}")


def _format_metrics(probe: dict[str, Any]) -> str:
    return f"{probe['accuracy']:>10.4f}{probe['f1_macro']:>10.4f}"


def _print_calibration(calibration: dict[str, dict[str, Any]], console: Console) -> None:
    console.print()
    console.print(f"{'teacher':<8}    rows  accuracy  confidence     ECE     NLL")
    for split, values in calibration.items():
        accuracy, confidence = values["accuracy"], values["confidence"]
        errors = f"{values['ece']:>8.4f}{values['nll']:>8.4f}"
        console.print(f"{split:<8}{values['rows']:>8,}{accuracy:>10.4f}{confidence:>12.4f}{errors}")
        direction = "over" if confidence > accuracy else "under"
        console.print(f"  {direction}confident by {100 * abs(confidence - accuracy):.2f} points on average")


def _print_similar_classes(record: dict[str, Any], console: Console) -> None:
    split, temperature = record["similarity_split"], record["settings"]["temperature"]
    pairs = [
        f"{make_printable(pair['true'])} as {make_printable(pair['other'])} ({pair['probability']:.4f})"
        for pair in record["most_confused"][:_LISTED]
    ]
    if pairs:
        console.print(
            f"highest mean probability of another class than the true one, at temperature {temperature:g} on {split}:"
            f" {'; '.join(pairs)}"
        )


def _print_temperatures(soft_targets: dict[str, Any], console: Console) -> None:
    records = soft_targets["temperatures"]
    console.print()
    rows = _describe_sample(soft_targets["rows"], soft_targets["of"], "training rows")
    console.print(f"Soft targets, {rows} of draw 0:")
    console.print("temperature  entropy  / log K  other classes  information")
    for record in records:
        share = "n/a" if record["share"] is None else f"{record['share']:.4f}"
        console.print(
            f"{record['temperature']:>11}  {record['entropy']:>7.4f}  {share:>7}  {record['others']:>13.4f}"
            f"  {record['information']:>11.3g}"
        )
    if unlabelled := soft_targets["by_own_class"]:
        console.print(f"({unlabelled:,} rows without a single label: their class is the teacher's prediction)")
    best = soft_targets["most_information_at"]
    is_at_end = best in (records[0]["temperature"], records[-1]["temperature"])
    beyond = ", and is at an end of this table: the maximum may lie beyond it" if is_at_end else ""
    console.print(
        f"Temperature {best} carries the most information{beyond}. (Information: the mutual information, in nats,"
        " between a row and a class drawn from its soft target, among rows with the same first class of the teacher"
        " and without that class; 0 for hard and for flat targets.)"
    )
