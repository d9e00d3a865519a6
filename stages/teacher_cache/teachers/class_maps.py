"""`--class-map`: which of a teacher's classes stand for a class of the data, by name or from a file."""

import csv
import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import torch

from softcache.base.errors import CacheError, UsageError, make_printable
from softcache.base.files import read_input_file
from softcache.data.transfer_set import TransferSet
from softcache.data.views.policy import ViewPolicy
from softcache.data.views.render import render
from softcache.pipeline.models.class_map import ClassMap
from softcache.pipeline.models.configurations import find_configuration
from softcache.pipeline.models.custom_networks import is_live_arch
from softcache.pipeline.models.other_frameworks.file_network import StoredTargets, parse_file_teacher
from softcache.pipeline.models.prepared_model import PreparedModel
from softcache.stages.cli.configs import CacheConfig
from softcache.stages.cli.console import Console

from .recorded_run import read_run

NAMES = "names"  # the value of --class-map that needs no file
_MAX_BYTES = 16 << 20
_HEADER = ("class", "data", "data class")  # first cell of a line that is a heading
_WORDNET = re.compile(r"\bn[0-9]{8}\b")
_LISTED = 3  # names of a kind in a message


def check_class_map(config: CacheConfig) -> None:
    """Check, before an image is read, that there is the file of --class-map, and a teacher that has classes.

    Raises:
        UsageError: There is none.
    """
    if not config.class_map:
        return
    is_trained_here = not (config.weights or parse_file_teacher(config.teacher) or is_live_arch(config.teacher))
    if is_trained_here:
        raise UsageError(
            f"--class-map {config.class_map} needs --weights: a teacher that is trained here has the classes of the"
            " data"
        )
    if config.class_map != NAMES and not Path(config.class_map).is_file():
        raise UsageError(f"--class-map: there is no file '{make_printable(config.class_map)}'; or say names")


def make_class_map(
    config: CacheConfig,
    teacher: PreparedModel,
    arch: str,
    transfer_set: TransferSet,
    views: ViewPolicy,
    console: Console,
) -> ClassMap | None:
    """Make the class map that the options name.

    Args:
        config: Options of the command, with a class_map.
        teacher: In eval mode, on its device.
        arch: Its arch.
        transfer_set: The data.
        views: The view policy, with a size.
        console: Prints which classes stand for which.

    Returns:
        The map; None where the teacher's classes are those of the data, in their order.

    Raises:
        UsageError: The data have no classes, the teacher no names where they are needed, or a class has no match.
        CacheError: The file cannot be read.
    """
    classes = transfer_set.classes
    if not classes:
        raise UsageError(f"--class-map {config.class_map}: these data have no classes")
    outputs = _count_outputs(teacher, transfer_set, views)
    names = _find_teacher_names(config, arch, outputs)
    if config.class_map == NAMES:
        if not names:
            raise UsageError(
                f"--class-map names: the names of the teacher's {outputs} classes are not known: name them or their"
                " numbers in a file of lines 'class of the data, class of the teacher'"
            )
        columns = match_names(classes, names)
    else:
        columns = read_class_map(Path(config.class_map), classes, names, outputs)
    class_map = ClassMap(columns)
    if class_map.is_identity(outputs):
        console.print("class map: the teacher's classes are those of the data, in their order; no map is needed")
        return None
    console.print(_describe(columns, classes, names, outputs))
    return class_map


class _KnownNames:
    """The names of a teacher's classes, by which their columns are found.

    Args:
        names: In the order of the logits.

    Attributes:
        names: As given.
        exact: {name: columns}; in ImageNet, "Cardigan" is a dog and "cardigan" is not.
        whole: {normalised name: columns}.
        parts: {normalised synonym, WordNet id or name without its id: columns}.
    """

    def __init__(self, names: Sequence[str]):
        self.names = names
        self.exact: dict[str, list[int]] = {}
        self.whole: dict[str, list[int]] = {}
        self.parts: dict[str, list[int]] = {}
        for column, name in enumerate(names):
            self.exact.setdefault(name, []).append(column)
            self.whole.setdefault(_normalize(name), []).append(column)
            parts = (*name.split(","), *_WORDNET.findall(name), _WORDNET.sub("", name))
            for part in dict.fromkeys(map(_normalize, parts)):
                self.parts.setdefault(part, []).append(column)

    def find(self, name: str) -> list[int]:
        """Return the columns of a name: none, one, or all that it may stand for."""
        if name in self.exact:
            return self.exact[name]
        keys = (name, *_WORDNET.findall(name.lower()), _WORDNET.sub("", name.lower()))
        for key in map(_normalize, keys):
            for table in (self.whole, self.parts):
                if key and key in table:
                    return table[key]
        return []


def restore_class_map(columns: list[list[int]], classes: int, cache: str) -> ClassMap:
    """Make the class map that the identity of a cache has.

    Raises:
        CacheError: It is not one of these classes.
    """
    if len(columns) != classes or not all(columns):
        raise CacheError(f"'{cache}': its class map has {len(columns)} classes, some perhaps empty, it has {classes}")
    return ClassMap(columns)


def match_names(classes: Sequence[str], names: Sequence[str]) -> list[list[int]]:
    """Match classes of the data with a teacher's by name.

    An equal name comes first. Else upper and lower case are equal, and so are blanks, `_` and `-`. A name of the
    teacher may be a list of synonyms with commas between them, as in ImageNet, and both may have a WordNet id such as
    n02084071.

    Args:
        classes: Names of the data's classes.
        names: Names of the teacher's classes, in the order of its logits.

    Returns:
        Of each class of the data, the column of the teacher.

    Raises:
        UsageError: A class has no match or several.
    """
    known = _KnownNames(names)
    columns, missing = [], []
    for name in classes:
        found = known.find(name)
        if len(found) > 1:
            text = ", ".join(f"{column} '{make_printable(names[column], 40)}'" for column in found[:_LISTED])
            raise UsageError(
                f"--class-map names: class '{make_printable(name, 40)}' of the data matches several of the teacher's,"
                f" {text}: name one or all of them in a file"
            )
        if not found:
            missing.append(_suggest(name, known.parts))
        columns.append(found)
    if missing:
        more = f" and {len(missing) - _LISTED} more" if len(missing) > _LISTED else ""
        raise UsageError(
            f"--class-map names: {len(missing)} of {len(classes)} classes of the data are none of the teacher's"
            f" {len(names)}: {', '.join(missing[:_LISTED])}{more}. Name theirs in a file of lines 'class of the data,"
            " class of the teacher'"
        )
    _refuse_double(columns, classes, names)
    return columns


def read_class_map(path: Path, classes: Sequence[str], names: Sequence[str], outputs: int) -> list[list[int]]:
    """Read a class map from a file of two columns: a class of the data, and a class of the teacher that stands for it.

    Args:
        path: Text of two columns, with a tab, a comma or a semicolon between them, one pair a line. Several lines of
            one class are summed. A class of the teacher is a name, or its number from 0 on. Lines that begin with #
            are comments.
        classes: Names of the data's classes.
        names: Names of the teacher's classes; empty where they are not known.
        outputs: Number of the teacher's classes.

    Returns:
        Of each class of the data, the columns of the teacher, in ascending order.

    Raises:
        UsageError: A class does not exist, is named twice or not at all.
        CacheError: The file is no text.
    """
    by_name = {_normalize(name): k for k, name in reversed(list(enumerate(classes)))}
    exact = {name: k for k, name in enumerate(classes)}
    known = _KnownNames(names)
    columns: list[list[int]] = [[] for _ in classes]
    for line, (data_class, teacher_class) in _read_pairs(path):
        place = f"--class-map {path}:{line}"
        k = exact.get(data_class, by_name.get(_normalize(data_class)))
        if k is None:
            if line == 1 and data_class.lower() in _HEADER:
                continue
            hint = _suggest(data_class, {_normalize(name): [k] for k, name in enumerate(classes)})
            raise UsageError(f"{place}: the data have no class {hint}")
        column = _find_column(teacher_class, known, outputs, place)
        if column in columns[k]:
            raise UsageError(
                f"{place}: '{make_printable(teacher_class, 40)}' is there twice for '{make_printable(data_class, 40)}'"
            )
        columns[k].append(column)
    if missing := [name for name, found in zip(classes, columns, strict=True) if not found]:
        text = ", ".join(f"'{make_printable(name, 40)}'" for name in missing[:_LISTED])
        more = f" and {len(missing) - _LISTED} more" if len(missing) > _LISTED else ""
        raise UsageError(f"--class-map {path}: {len(missing)} of {len(classes)} classes have no line: {text}{more}")
    _refuse_double(columns, classes, names)
    return [sorted(found) for found in columns]


def _read_pairs(path: Path) -> list[tuple[int, tuple[str, str]]]:
    """Read the lines of a file as (number, (class of the data, class of the teacher))."""
    content = read_input_file(path)
    if len(content) > _MAX_BYTES:
        raise CacheError(f"'{path}' has {len(content):,} bytes: a class map has {_MAX_BYTES:,} at most")
    try:
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise CacheError(f"'{path}' is no text in UTF-8") from None
    pairs = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        separator = next((sign for sign in ("\t", ";", ",") if sign in line), "")
        cells = next(csv.reader([line], delimiter=separator, skipinitialspace=True)) if separator else [line]
        cells = [cell.strip() for cell in cells]
        if len(cells) != 2 or not all(cells):
            raise UsageError(
                f"--class-map {path}:{number}: '{make_printable(line, 60)}' is not a class of the data and one of the"
                " teacher, with a tab, a semicolon or a comma between them; a name with a comma is put in quotes"
            )
        pairs.append((number, (cells[0], cells[1])))
    return pairs


def _find_column(text: str, known: _KnownNames, outputs: int, place: str) -> int:
    """Find the column of a class of the teacher: by its exact name, by its number, or by a similar name."""
    if sum(name == text for name in known.names) == 1:
        return list(known.names).index(text)
    if text.isascii() and text.isdigit():
        if len(text) > 9 or int(text) >= outputs:
            raise UsageError(f"{place}: the teacher has no class {text[:20]}: it outputs {outputs}, from 0 on")
        return int(text)
    if not known.names:
        raise UsageError(
            f"{place}: '{make_printable(text, 40)}' is a name, and those of the teacher's classes are not known: give"
            " its number, from 0 on"
        )
    found = known.find(text)
    if len(found) != 1:
        problem = f"stands for {len(found)} of the teacher's classes" if found else "is no class of the teacher"
        raise UsageError(f"{place}: {_suggest(text, known.parts)} {problem}: give its number, from 0 on")
    return found[0]


def _find_teacher_names(config: CacheConfig, arch: str, outputs: int) -> list[str]:
    """Find the names of a teacher's classes: recorded by its run, or published; none where there are none.

    Of a file of weights for a published network, they are those of the published weights where it has as many outputs.
    """
    path = Path(config.weights)
    if config.weights and (path / "result.json").is_file():
        names = read_run(path, config).classes or []
    else:
        configuration = find_configuration(arch)
        names = list(configuration.class_names) if configuration else []
    return names if len(names) == outputs else []


def _count_outputs(teacher: PreparedModel, transfer_set: TransferSet, views: ViewPolicy) -> int:
    """Count the columns of a teacher's outputs, by two views."""
    if isinstance(teacher.network, StoredTargets):
        return len(next(iter(teacher.network.logits.values()))[0])
    images = transfer_set.splits["train"].images
    rendered = render(images, views, 0, np.arange(min(2, len(images))), 0)
    with torch.inference_mode():
        outputs = teacher(rendered.to(teacher.scale.device))
    return int(outputs.shape[-1])


def _refuse_double(columns: list[list[int]], classes: Sequence[str], names: Sequence[str]) -> None:
    """Raise UsageError where one class of the teacher stands for two of the data."""
    owner: dict[int, str] = {}
    for name, found in zip(classes, columns, strict=True):
        for column in found:
            if column in owner:
                described = _describe_column(column, names)
                raise UsageError(
                    f"--class-map: the teacher's class {described} stands for '{make_printable(owner[column], 40)}'"
                    f" and '{make_printable(name, 40)}': a class of the teacher can stand for one"
                )
            owner[column] = name


def _describe(columns: list[list[int]], classes: Sequence[str], names: Sequence[str], outputs: int) -> str:
    pairs = [
        f"{make_printable(name, 40)} = {' + '.join(_describe_column(column, names) for column in found[:_LISTED])}"
        + (f" + {len(found) - _LISTED} more" if len(found) > _LISTED else "")
        for name, found in zip(classes, columns, strict=True)
    ]
    more = f"; and {len(pairs) - _LISTED} more" if len(pairs) > _LISTED else ""
    used = sum(map(len, columns))
    return f"class map: {used:,} of the teacher's {outputs:,} classes are used: {'; '.join(pairs[:_LISTED])}{more}"


def _describe_column(column: int, names: Sequence[str]) -> str:
    return f"{column} '{make_printable(names[column], 40)}'" if names else str(column)


def _suggest(name: str, known: dict[str, list[int]]) -> str:
    """Return a name in quotes, with the most similar one that is known."""
    key = _normalize(name)
    similar = get_close_matches(key, known, n=1) or [other for other in known if key and key in other.split()][:1]
    hint = f" (did you mean '{make_printable(similar[0], 40)}'?)" if similar else ""
    return f"'{make_printable(name, 40)}'{hint}"


def _normalize(name: str) -> str:
    return " ".join(re.sub(r"[\s_-]+", " ", name.casefold()).split())
