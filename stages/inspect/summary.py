"""What `softcache inspect` found, in words."""

from typing import Any

from softcache.base.errors import make_printable
from softcache.stages.cli.console import Console

_WORDS = 5  # pairs of classes and channels of a tap that are named


def print_findings(record: dict[str, Any], console: Console) -> None:
    """The tables of taps, of calibration and of temperatures, each with the sentence that it is for."""
    if record["no_taps"]:
        console.print(record["no_taps"])
    else:
        _taps(record, console)
    if record["calibration"]:
        _calibration(record, console)
    else:
        console.print("the held-out rows have no labels: no calibration, no similarity of classes")
    _temperatures(record["soft_targets"], console)
    console.print()


def _part(rows: int, of: int, what: str) -> str:
    """How many rows were read, and whether they are all."""
    return f"all {of:,} {what}" if rows == of else f"a random sample of {rows:,} of {of:,} {what}"


def _taps(record: dict[str, Any], console: Console) -> None:
    taps, joint = record["taps"], record["joint"]
    train = _part(joint["train_rows"], joint["train_of"], "training rows")
    held_out = _part(joint["rows"], joint["of"], f"rows of {joint['split']}")
    console.print(f"Linear probes, trained on {train} of draw 0, measured on {held_out}:")
    if missing := joint["classes_without_rows"]:
        console.print(f"({len(missing)} classes have no row there: n/a, and not in macro F1)")
    width = max(len("all taps together"), *(len(make_printable(tap)) for tap in taps))
    console.print(f"{'tap':<{width}}  accuracy  macro F1  importance (mean ± sd)  columns")
    for tap, found in taps.items():
        importance = f"{found['importance']['mean']:.4f} ± {found['importance']['sd']:.4f}"
        console.print(
            f"{make_printable(tap):<{width}}{_figures(found)}  {importance:<22}  {found['columns']:,}, {found['form']}"
        )
    console.print(f"{'all taps together':<{width}}{_figures(joint)}")
    console.print(f"{'teacher':<{width}}{joint['teacher']:>10.4f}")
    console.print(f"{'largest class':<{width}}{joint['majority']:>10.4f}")
    console.print(
        "(importance: accuracy that the probe of all taps loses when one is permuted; taps that say the same share)"
    )
    if slow := [tap for tap, found in {**taps, "all taps together": joint}.items() if not found["converged"]]:
        console.print(f"(not converged: {make_printable(', '.join(slow))}; a linear probe can do a little better)")
    for tap, rows in record["channels"].items():
        first = ", ".join(f"{row['channel']} ({row['mean']:.4f})" for row in rows[:_WORDS] if row["mean"] > 0)
        first = first or "none, any one of them can be missed"
        console.print(f"channels of {make_printable(tap)} that its own probe needs most: {first}")


def _figures(found: dict[str, Any]) -> str:
    return f"{found['accuracy']:>10.4f}{found['f1_macro']:>10.4f}"


def _calibration(record: dict[str, Any], console: Console) -> None:
    console.print()
    console.print(f"{'teacher':<8}    rows  accuracy  confidence     ECE     NLL")
    for split, found in record["calibration"].items():
        figures = f"{found['accuracy']:>10.4f}{found['confidence']:>12.4f}{found['ece']:>8.4f}{found['nll']:>8.4f}"
        console.print(f"{split:<8}{found['rows']:>8,}{figures}")
        gap = found["confidence"] - found["accuracy"]
        console.print(f"  {'over' if gap > 0 else 'under'}confident by {100 * abs(gap):.2f} points on average")
    split, T = record["similarity_split"], record["settings"]["temperature"]
    pairs = record["most_confused"][:_WORDS]
    if pairs:
        said = "; ".join(
            f"{make_printable(p['true'])} for {make_printable(p['other'])} ({p['probability']:.4f})" for p in pairs
        )
        console.print(f"taken most for another class, at temperature {T:g} on {split}: {said}")


def _temperatures(soft: dict[str, Any], console: Console) -> None:
    console.print()
    console.print(f"Soft targets, {_part(soft['rows'], soft['of'], 'training rows')} of draw 0:")
    console.print("temperature  entropy  / log K  other classes  information")
    for r in soft["temperatures"]:
        share = "n/a" if r["share"] is None else f"{r['share']:.4f}"
        T, others = r["temperature"], r["others"]
        console.print(f"{T:>11}  {r['entropy']:>7.4f}  {share:>7}  {others:>13.4f}  {r['information']:>11.3g}")
    if own := soft["by_own_class"]:
        console.print(f"({own:,} rows without one label: their class is the one the teacher says)")
    best, all_ = soft["most_information_at"], [r["temperature"] for r in soft["temperatures"]]
    edge = ", an end of this table: it may lie beyond" if best in (all_[0], all_[-1]) else ""
    console.print(
        f"Temperature {best} carries most information{edge}. (Information: nats that the probabilities beside the"
        " teacher's first class say about a row, those of one first class compared: the entropy of their mean less the"
        " mean of their entropies; 0 where targets are hard, or flat.)"
    )
