"""Write stages/student/losses.json, what `softcache losses` prints, from the losses themselves.

python docs/make_loss_list.py            write the file
python docs/make_loss_list.py --check    write nothing; exit code 1 where the file is not current
"""

import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the checkout that this file is part of, whatever is installed

from softcache.pipeline.losses import LOSSES, Loss  # noqa: E402
from softcache.pipeline.losses.base import Ramp  # noqa: E402
from softcache.pipeline.losses.feature_base import FeatureLoss, RelationalLoss  # noqa: E402

FILE = ROOT / "stages/student/losses.json"


def describe_loss(loss: Loss) -> dict[str, Any]:
    """Describe a loss as plain values.

    Returns:
        what: the first line of its documentation; knobs: {parameter: default, as --loss takes it}; reads: what it
        needs of labels and teacher.
    """
    parameters = {f.name: _format_default(getattr(loss, f.name)) for f in fields(loss)}  # type: ignore[arg-type]
    reads = []
    if loss.needs_labels:
        reads.append("labels")
    if loss.needs_logits and not isinstance(loss, RelationalLoss):
        reads.append("logits")
    if isinstance(loss, FeatureLoss):
        embedding = " or an embedding" if isinstance(loss, RelationalLoss) else ""
        reads.append(f"taps ({loss.statistic}){embedding}")
    if loss.needs_head:
        reads.append("the teacher's last layer")
    if loss.needs_counts:
        reads.append("counts of the classes")
    return {"what": (loss.__doc__ or "").splitlines()[0], "knobs": parameters, "reads": reads}


def _format_default(value: Any) -> Any:
    if isinstance(value, Ramp):
        return f"{value.start:g}->{value.end:g}" + (f"@{value.epochs}" if value.epochs else "")
    return str(value).lower() if isinstance(value, bool) else value


def main() -> None:
    """Write the file, or with --check compare it."""
    text = (
        json.dumps({name: describe_loss(loss) for name, loss in LOSSES.items()}, indent=1, ensure_ascii=False) + "\n"
    )
    if "--check" in sys.argv[1:]:
        if FILE.read_text(encoding="utf-8") != text:
            sys.exit(f"{FILE.relative_to(ROOT)} is not current: run  python docs/make_loss_list.py")
        return
    FILE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
