"""Write docs/reference/python.md from the docstrings and signatures of the public names.

python docs/make_api_reference.py            write the page
python docs/make_api_reference.py --check    write nothing; exit code 1 where the page is not current

The exit code is also 1 where a public name or method has no docstring, a parameter is not described, or a section
describes one that does not exist.
"""

import ast
import copy
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, is_dataclass
from functools import cache, cached_property
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the checkout that this file is part of, whatever is installed

import softcache  # noqa: E402

PAGE = ROOT / "docs/reference/python.md"
HEAD = """# Python

<!-- Written by docs/make_api_reference.py: change the docstrings, not this page. -->

The public names of `import softcache` and of its module `softcache.losses`. [From Python](../guides/python.md) is the
guide with examples. B is the number of rows of a batch, C of channels, K of classes, M of teachers; N is the number of
rows of a split, S the side of a view in pixels.
"""
SECTIONS = {
    "Caches": ("Cache", "CacheLoader", "Batch"),
    "Training": ("DistillationLoss", "ModelOutputs", "evaluate"),
    "Both stages": ("build_cache", "train_student", "distill"),
    "Errors": ("CacheError", "UsageError"),
}
LOSSES = "Losses"  # the section of softcache.losses
DESCRIPTIONS = ("Args", "Attributes")  # sections of `name: text`
TEXTS = ("Returns", "Yields", "Raises", "Source")
SPECIAL_METHODS = ("__len__", "__iter__", "__call__")
# What the commands use of these classes; it may change, and is no part of the contract.
OF_THE_COMMANDS = {
    "Cache.from_parts",
    "Cache.make_context",
    "Cache.read_head",
    "Cache.reader",
    "ConcatHint.with_default_layers",
    "Custom.copy_for_training",
    "DistillationLoss.build_parts",
    "SimKD.projected_layer",
}


class DocumentationError(Exception):
    """A docstring is missing, or it does not describe what it belongs to."""


@dataclass
class Docstring:
    """A docstring in parts.

    Attributes:
        summary: Its first paragraph, in one line.
        body: The paragraphs between the summary and the first section.
        descriptions: {"Args" or "Attributes": {names, as they are written: text}}.
        texts: {"Returns", "Yields", "Raises" or "Source": lines without their indentation}.
    """

    summary: str
    body: str
    descriptions: dict[str, dict[str, str]] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)

    def names(self, section: str) -> list[str]:
        """Return the names that a section describes; `a, b: text` describes two."""
        return [name for names in self.descriptions.get(section, {}) for name in names.split(", ")]


def write_page() -> str:
    """Return the whole page: a table of contents, then each name with its parameters and methods.

    Raises:
        DocumentationError: A docstring is missing, or does not describe what it belongs to.
    """
    sections = {
        heading: {f"softcache.{name}": getattr(softcache, name) for name in SECTIONS[heading]} for heading in SECTIONS
    }
    listed = {name.partition(".")[2] for names in sections.values() for name in names}
    if listed != set(softcache.__all__) - {"losses"}:
        raise DocumentationError(f"SECTIONS lists {sorted(listed)}, softcache.__all__ {softcache.__all__}")
    losses = {name: getattr(softcache.losses, name) for name in sorted(softcache.losses.__all__, key=str.lower)}
    sections[LOSSES] = {f"losses.{name}": value for name, value in losses.items() if callable(value)}
    parts = [HEAD]
    for heading, names in sections.items():
        lines = [_format_entry(name, value) for name, value in names.items()]
        parts.append("\n".join([f"| {heading} | |", "|---|---|", *lines]) + "\n")
    parts += [describe(name, value) for names in sections.values() for name, value in names.items()]
    return "\n".join(parts)


def _format_entry(name: str, value: Any) -> str:
    """Return a line of the table of contents; of a loss, with its name in `--loss`."""
    option = next((key for key, loss in softcache.losses.LOSSES.items() if type(loss) is value), "")
    link = f"[`{name}`](#{_anchor(name)})" + (f" `{option}`" if option else "")
    return f"| {link} | {_to_cell(_read(value, name).summary)} |"


def describe(name: str, value: Any) -> str:
    """Return the section of a public name.

    Args:
        name: With its module: `losses.KD`.
        value: A class or a function.

    Raises:
        DocumentationError: As `write_page`.
    """
    docstring = _read(value, name)
    if not inspect.isclass(value):
        _check_parameters(name, value, docstring)
        return f"## `{name}`\n\n{_format(docstring, _format_signature(name, value))}"
    is_exception = issubclass(value, Exception)
    is_protocol = getattr(value, "_is_protocol", False)
    if not (is_exception or is_protocol):
        _check_parameters(name, value, docstring)
    _check_attributes(name, value, docstring)
    signature = "" if is_exception or is_protocol else _format_signature(name, value)
    parts = [f"## `{name}`\n\n{_format(docstring, signature)}"]
    described = docstring.names("Attributes")
    for method, function in _list_methods(value):
        if method in described:
            continue
        title = f"{value.__name__}.{method}"
        docstring = _read(function, title)
        if isinstance(function, property | cached_property):
            signature = ""
        else:
            _check_parameters(title, function, docstring)
            signature = _format_signature(title, function)
        parts.append(f"### `{title}`\n\n{_format(docstring, signature)}")
    return "\n".join(parts)


def _list_methods(kind: type) -> Iterator[tuple[str, Any]]:
    """Yield the public methods and properties of a class that no class above it in softcache describes."""
    bases = [base for base in kind.__mro__[1:] if base.__module__.startswith("softcache.")]
    for name, value in vars(kind).items():
        is_member = inspect.isfunction(value) or isinstance(
            value, classmethod | staticmethod | property | cached_property
        )
        is_public = not name.startswith("_") or name in SPECIAL_METHODS
        if f"{kind.__name__}.{name}" in OF_THE_COMMANDS:
            continue
        if is_member and is_public and not any(name in vars(base) for base in bases):
            yield name, getattr(kind, name) if isinstance(value, classmethod | staticmethod) else value


# Docstrings


def _read(value: Any, name: str) -> Docstring:
    """Read the docstring of a class, function or property.

    Raises:
        DocumentationError: There is none, or it has a section that is not known.
    """
    text = (value.func if isinstance(value, cached_property) else value).__doc__
    if not text or (inspect.isclass(value) and text.startswith(f"{value.__name__}(")):  # one that dataclass made
        raise DocumentationError(f"{name} has no docstring")
    paragraphs, sections = _split_sections(inspect.cleandoc(text), name)
    summary, _, body = paragraphs.partition("\n\n")
    docstring = Docstring(_join(summary), body)
    for section, lines in sections.items():
        if section in DESCRIPTIONS:
            docstring.descriptions[section] = _split_descriptions(lines, f"{section} of {name}")
        else:
            docstring.texts[section] = lines
    return docstring


def _split_sections(text: str, name: str) -> tuple[str, dict[str, str]]:
    """Split a docstring into what is before its sections, and {section: its lines without their indentation}."""
    paragraphs: list[str] = []
    sections: dict[str, list[str]] = {}
    lines = paragraphs
    for line in text.splitlines():
        if heading := re.fullmatch(r"([A-Z]\w+):( .+)?", line):
            section, rest = heading[1], heading[2]
            if section in (*DESCRIPTIONS, *TEXTS) and (rest is None or section == "Source"):
                lines = sections[section] = [f"    {rest.strip()}"] if rest else []
                continue
            if rest is None:
                raise DocumentationError(
                    f"{name} has a section '{section}', which is none of {', '.join((*DESCRIPTIONS, *TEXTS))}"
                )
        lines.append(line)
    return "\n".join(paragraphs).strip(), {
        key: textwrap.dedent("\n".join(lines)).strip() for key, lines in sections.items()
    }


def _split_descriptions(text: str, place: str) -> dict[str, str]:
    """Split lines `name: text`, of which further lines are indented, into {names: text}."""
    descriptions: dict[str, str] = {}
    for entry in re.split(r"\n(?=\S)", text):
        match = re.match(r"((?:\w+)(?:, \w+)*): (.+)", entry, re.DOTALL)
        if not match:
            raise DocumentationError(f"{place} has no 'name: text' in the line '{entry.splitlines()[0]}'")
        descriptions[match[1]] = _join(match[2])
    return descriptions


def _check_parameters(name: str, value: Callable[..., Any], docstring: Docstring) -> None:
    """Compare the parameters of a function or class with those that its docstring describes.

    Raises:
        DocumentationError: They differ.
    """
    parameters = [parameter for parameter in inspect.signature(value).parameters if parameter != "self"]
    described = docstring.names("Args")
    known = described + (docstring.names("Attributes") if inspect.isclass(value) else [])
    if missing := [parameter for parameter in parameters if parameter not in known]:
        raise DocumentationError(f"{name} has the parameters {', '.join(missing)}, which its Args do not describe")
    if unknown := [parameter for parameter in described if parameter not in parameters]:
        raise DocumentationError(f"Args of {name} describe {', '.join(unknown)}, which are no parameters of it")


def _check_attributes(name: str, kind: type, docstring: Docstring) -> None:
    """Raise DocumentationError where an attribute is described that no class above or the class itself sets."""
    source = "\n".join(inspect.getsource(base) for base in kind.__mro__ if base.__module__.startswith("softcache."))
    for attribute in docstring.names("Attributes"):
        if not re.search(
            rf"\b(?:self|cls|cache)\.{attribute}\b|^    {attribute}: |\bdef {attribute}\(", source, re.MULTILINE
        ):
            raise DocumentationError(f"Attributes of {name} describe {attribute}, which it does not have")


# Markdown


def _format(docstring: Docstring, signature: str) -> str:
    """Return a docstring as Markdown: its text, the signature, tables of its parameters, then its other sections."""
    parts = [docstring.summary, _format_body(docstring.body) if docstring.body else ""]
    parts.append(f"```text\n{signature}\n```" if signature else "")
    for section, title in zip(DESCRIPTIONS, ("Arguments", "Attributes"), strict=True):
        if rows := docstring.descriptions.get(section):
            lines = [f"| {_quote_names(names)} | {_to_cell(text)} |" for names, text in rows.items()]
            parts.append("\n".join([f"| {title} | |", "|---|---|", *lines]))
    for section in ("Returns", "Yields"):
        if text := docstring.texts.get(section):
            parts.append(f"**{section}** {_format_returns(text)}")
    if text := docstring.texts.get("Raises"):
        parts.append(f"**Raises**\n\n{_format_list(text)}")
    if text := docstring.texts.get("Source"):
        parts.append(f"**Source** {_join(text)}")
    return "\n\n".join(part for part in parts if part) + "\n"


def _format_body(body: str) -> str:
    """Return the paragraphs of a docstring; indented lines become a list of `name: text`, or a block of code."""
    parts = []
    for paragraph in body.split("\n\n"):
        text = textwrap.dedent(paragraph)
        if text == paragraph:
            parts.append(_join(text))
        elif re.match(r"\w+: ", text):
            parts.append(_format_list(text))
        else:
            parts.append(f"<!-- not run: an outline -->\n```python not-run\n{text}\n```")
    return "\n\n".join(parts)


def _format_returns(text: str) -> str:
    """Return a section of text; its second paragraph, as `evaluate` has one, is a list of `name: text`."""
    first, _, second = text.partition("\n\n")
    return _join(first) + (f"\n\n{_format_list(second)}" if second else "")


def _format_list(text: str) -> str:
    """Return lines `name: text` as a list."""
    rows = _split_descriptions(text, f"the list '{text[:20]} …'")
    return "\n".join(f"- {_quote_names(names)}: {row}" for names, row in rows.items())


def _format_signature(name: str, value: Callable[..., Any]) -> str:
    """Return a call with its types and defaults; with one parameter a line where it does not fit into one line."""
    types = _read_types(value)
    texts = _list_parameters(inspect.signature(value), types)
    end = f") -> {types['return']}" if "return" in types and not inspect.isclass(value) else ")"
    line = f"{name}({', '.join(texts)}{end}"
    return line if len(line) <= 100 else f"{name}(\n" + "".join(f"    {text},\n" for text in texts) + end


def _list_parameters(signature: inspect.Signature, types: dict[str, str]) -> list[str]:
    """Return each parameter as a definition has it, and the `*` before the first one that needs its keyword."""
    texts: list[str] = []
    has_star = False
    for parameter in signature.parameters.values():
        if parameter.name == "self":
            continue
        is_keyword, is_rest = parameter.kind is parameter.KEYWORD_ONLY, parameter.kind is parameter.VAR_POSITIONAL
        if is_keyword and not has_star:
            texts.append("*")
        has_star = has_star or is_keyword or is_rest
        star = "*" if is_rest else "**" if parameter.kind is parameter.VAR_KEYWORD else ""
        default = "" if parameter.default is parameter.empty else f" = {_format_default(parameter.default)}"
        texts.append(f"{star}{parameter.name}: {types[parameter.name]}{default}")
    return texts


def _format_default(value: Any) -> str:
    if isinstance(value, str):
        return f'"{value}"'
    return "{}" if repr(value) == "<factory>" else repr(value)  # the fields with a factory are dicts


def _read_types(value: Any) -> dict[str, str]:
    """Return {parameter: its type} as the source has it, and the type of what is returned as "return"."""
    if is_dataclass(value):
        types: dict[str, str] = {}
        for kind in reversed(value.__mro__):
            if is_dataclass(kind):
                fields = [node for node in _parse(kind).body if isinstance(node, ast.AnnAssign)]
                types |= {ast.unparse(node.target): _format_type(node.annotation, kind) for node in fields}
        return types
    function = value.__init__ if inspect.isclass(value) else value
    if not (inspect.isfunction(function) or inspect.ismethod(function)):  # the class has no __init__ of its own
        return {}
    definition = _parse(function)
    rest = [argument for argument in (definition.args.vararg, definition.args.kwarg) if argument]
    arguments = [*definition.args.args, *definition.args.kwonlyargs, *rest]
    types = {node.arg: _format_type(node.annotation, function) for node in arguments if node.annotation}
    return types | ({"return": _format_type(definition.returns, function)} if definition.returns else {})


def _parse(value: Any) -> Any:
    """Return the syntax tree of a class or function."""
    return ast.parse(textwrap.dedent(inspect.getsource(value))).body[0]


def _format_type(annotation: ast.expr, owner: Any) -> str:
    """Return a type without quotes, with names of types such as `ProgressCallback` replaced by what they stand for."""
    return ast.unparse(_Resolver(sys.modules[owner.__module__]).visit(copy.deepcopy(annotation))).replace("'", "")


class _Resolver(ast.NodeTransformer):
    """Replaces the names of types that a module, or one that it imports from, sets by an assignment."""

    def __init__(self, module: ModuleType):
        self.module = module

    def visit_Name(self, node: ast.Name) -> ast.expr:
        """Return what the name stands for."""
        value, module = _find_alias(node.id, self.module)
        return node if value is None else _Resolver(module).visit(copy.deepcopy(value))


def _find_alias(name: str, module: ModuleType) -> tuple[ast.expr | None, ModuleType]:
    """Return what is assigned to a name and in which module: this one, or the one of softcache that it comes from."""
    for node in _parse_module(module):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return node.value, module
        if isinstance(node, ast.ImportFrom) and any(name == alias.name for alias in node.names):
            is_internal = node.level > 0 or (node.module or "").startswith("softcache")
            source = import_module("." * node.level + (node.module or ""), module.__package__) if is_internal else None
            return _find_alias(name, source) if source else (None, module)
    return None, module


@cache
def _parse_module(module: ModuleType) -> list[ast.stmt]:
    return ast.parse(inspect.getsource(module)).body


def _quote_names(names: str) -> str:
    return ", ".join(f"`{name}`" for name in names.split(", "))


def _anchor(name: str) -> str:
    """Return the anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", name.lower())


def _join(text: str) -> str:
    return " ".join(text.split())


def _to_cell(text: str) -> str:
    return _join(text).replace("|", r"\|")


def main() -> int:
    try:
        page = write_page()
    except DocumentationError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    if "--check" in sys.argv[1:]:
        is_current = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page
        if not is_current:
            print(f"{PAGE.relative_to(ROOT)} is out of date: run  make docs", file=sys.stderr)
        return int(not is_current)
    PAGE.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
