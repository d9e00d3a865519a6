"""The command of a student that is taught by one tap of a cache."""

import re
from shlex import quote

from softcache.base.errors import make_printable
from softcache.pipeline.cache.reader import Cache
from softcache.pipeline.taps.statistics import parse_tap
from softcache.stages.cli.configs import StudentConfig
from softcache.stages.cli.copied_commands import format_command

_LOSS = {"pool": "concat_hint", "attention": "attention", "gram": "nst"}  # of a statistic that has its own loss


def suggest_student(cache: Cache, tap: str) -> str:
    """`student` with kd beside the loss that a tap is for: `hint` of a map, a vector or a grid.

    The arch is one that has a layer of that name: resnet8 for the stages of a CIFAR ResNet, else the teacher's own.
    Code of a user's own, and folders of images, are left for them to name.
    """
    path, kind = parse_tap(tap)
    loss = f"{_LOSS[kind]}:teacher={path}" if kind in _LOSS else f"hint:teacher={tap}"
    where = " --data folder:PATH" if cache.data == "folder" else ""
    arch = f" --arch {_arch(cache.teacher, path)}"
    said = format_command("student", StudentConfig(cache=(str(cache.folder),)))
    return f"{said}{where}{arch} --loss kd --loss {quote(make_printable(loss, None))}"


def _arch(teacher: str, path: str) -> str:
    if re.fullmatch(r"resnet[0-9]+", teacher) and re.fullmatch(r"layer[123]", path):
        return "resnet8"
    if ":" in teacher and not teacher.startswith(("mlp:", "torchvision:")):
        return "my_package.module:factory"  # a manifest's word is not taken for what is imported
    return quote(make_printable(teacher))
