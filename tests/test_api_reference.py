"""The reference of the Python API: what its docstrings become, and the docstrings that are refused."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import pytest

import softcache
from tests.helpers.documents import DOCUMENTS
from tests.helpers.paths import ROOT

PAGE = DOCUMENTS["docs/reference/python.md"]
Describe = Callable[..., str]


@pytest.fixture(scope="module")
def generator() -> Iterator[ModuleType]:
    """The script, as a module."""
    spec = importlib.util.spec_from_file_location("make_api_reference", ROOT / "docs/make_api_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module, path = importlib.util.module_from_spec(spec), list(sys.path)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]
    sys.path[:] = path


def scale(x: float, factor: float = 2.0) -> float:
    """Scale a number.

    Args:
        x: The number,
            in any unit.
        factor: What it is multiplied by | 2 by default.

    Returns:
        x * factor.

    Raises:
        UsageError: The factor is 0.

    Source: Euclid.
    """
    return x * factor


def test_a_docstring_becomes_tables_and_lists(generator: ModuleType) -> None:
    assert generator.describe("softcache.scale", scale) == (
        "## `softcache.scale`\n\nScale a number.\n\n"
        "```text\nsoftcache.scale(x: float, factor: float = 2.0) -> float\n```\n\n"
        "| Arguments | |\n|---|---|\n| `x` | The number, in any unit. |\n"
        "| `factor` | What it is multiplied by \\| 2 by default. |\n\n"
        "**Returns** x * factor.\n\n**Raises**\n\n- `UsageError`: The factor is 0.\n\n**Source** Euclid.\n"
    )


def no_docstring(x: float) -> None:
    pass


def missing(x: float, y: float) -> None:
    """Do it.

    Args:
        x: A number.
    """


def unknown(x: float) -> None:
    """Do it.

    Args:
        x, z: Numbers.
    """


def unknown_section(x: float) -> None:
    """Do it.

    Arguments:
        x: A number.
    """


def not_an_entry(x: float) -> None:
    """Do it.

    Args:
        the number
    """


class NoMethodDocstring:
    """A class."""

    def run(self) -> None:
        pass


class UnknownAttribute:
    """A class.

    Attributes:
        rows: A number.
    """


@dataclass
class NoClassDocstring:
    rows: int


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (no_docstring, "a.name has no docstring"),
        (missing, "a.name has the parameters y, which its Args do not describe"),
        (unknown, "Args of a.name describe z, which are no parameters of it"),
        (unknown_section, "a.name has a section 'Arguments', which is none of Args, "),
        (not_an_entry, "Args of a.name has no 'name: text' in the line 'the number'"),
        (NoMethodDocstring, "NoMethodDocstring.run has no docstring"),
        (NoClassDocstring, "a.name has no docstring"),
        (UnknownAttribute, "Attributes of a.name describe rows, which it does not have"),
    ],
)
def test_what_a_docstring_lacks_is_an_error(generator: ModuleType, value: object, message: str) -> None:
    with pytest.raises(generator.DocumentationError) as error:
        generator.describe("a.name", value)
    assert str(error.value).startswith(message)


def test_an_error_is_one_line_and_exit_code_1(
    generator: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["make_api_reference.py", "--check"])
    monkeypatch.setattr(softcache, "evaluate", no_docstring, raising=False)
    assert generator.main() == 1
    assert capsys.readouterr().err == "Error: softcache.evaluate has no docstring\n"


def test_the_page_has_every_public_name() -> None:
    names = [f"softcache.{name}" for name in softcache.__all__ if name != "losses"]
    names += [f"losses.{name}" for name in softcache.losses.__all__ if name != "LOSSES"]
    assert [name for name in names if f"\n## `{name}`\n" not in PAGE] == []


def test_methods_of_torch_and_of_classes_above_are_left_out() -> None:
    assert "`DistillationLoss.attach`" in PAGE
    assert "`DistillationLoss.load_state_dict`" not in PAGE
    assert "`Loss.build_part`" in PAGE
    assert "`Hint.build_part`" not in PAGE
