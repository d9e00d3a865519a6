"""The command of a student with a hint from one tap of a cache."""

import re
from shlex import quote

from softcache.base.errors import make_printable
from softcache.data.sources import DATASET, format_placeholder, has_argument
from softcache.pipeline.cache.reader import CacheReader
from softcache.pipeline.models.custom_networks import is_live_arch
from softcache.pipeline.taps.statistics import parse_tap
from softcache.stages.cli.configs import StudentConfig
from softcache.stages.cli.copied_commands import format_command

_LOSS_OF_STATISTIC = {"pool": "concat_hint", "attention": "attention", "gram": "nst"}  # `hint` for all others


def suggest_student(cache: CacheReader, tap: str) -> str:
    """Format a `student` command, or of a dataset of a user's own a call in Python, with kd and the loss that fits a
    tap: `hint` for a map, a vector or a grid.

    The arch is one that has a layer of the tap's name: resnet8 for the stages of a CIFAR ResNet, else the teacher's
    arch. Placeholders stand for a folder of images and for an arch that is code of the user.

    Args:
        cache: The cache.
        tap: One of its taps.
    """
    layer, statistic = parse_tap(tap)
    if statistic in _LOSS_OF_STATISTIC:
        loss = f"{_LOSS_OF_STATISTIC[statistic]}:teacher={layer}"
    else:
        loss = f"hint:teacher={tap}"
    if cache.data == DATASET:
        opened = f"softcache.Cache({make_printable(cache.folder)!r}, data=your_dataset)"
        return (
            f"softcache.train_student({opened}, your_student, ['kd', {make_printable(loss, None)!r}], out='runs/hint')"
        )
    command = format_command("student", StudentConfig(cache=(str(cache.folder),)))
    data = f" --data {format_placeholder(cache.data)}" if has_argument(cache.data) else ""
    arch = _choose_arch(cache.teacher, layer)
    return f"{command}{data} --arch {arch} --loss kd --loss {quote(make_printable(loss, None))}"


def _choose_arch(teacher: str, layer: str) -> str:
    if re.fullmatch(r"resnet[0-9]+", teacher) and re.fullmatch(r"layer[123]", layer):
        return "resnet8"
    if is_live_arch(teacher):
        return "my_package.module:factory"
    if ":" in teacher and not teacher.startswith(("mlp:", "torchvision:", "timm:")):
        return "my_package.module:factory"  # a module named in a manifest is never suggested: it would be imported
    return quote(make_printable(teacher))
