"""The architecture: which package may import which, the only importers of each library, and what no file may do."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
from click.testing import CliRunner

from softcache.stages.main import commands
from tests.helpers.paths import ROOT

# From the lowest to the highest: a package imports those of lower levels alone, so there are no import circles.
LEVELS = (
    ("base",),
    ("data",),
    ("pipeline.taps",),
    ("pipeline.batch", "pipeline.metrics"),
    ("pipeline.models",),
    ("pipeline.cache",),
    ("pipeline.teachers",),
    ("pipeline.losses",),
    ("pipeline.loading",),
    ("stages.distributed",),
    ("stages.cli",),
    ("stages.runs",),
    ("stages.training", "stages.compare", "stages.inspect"),
    ("stages.teacher",),
    ("stages.teacher_cache",),
    ("stages.check_cache", "stages.head_cache", "stages.plan", "stages.student"),
    ("stages.export", "stages.report", "stages.tune"),
    ("stages.api",),
    ("stages.main",),
    ("stages.make_variables",),
)
LEVEL = {package: level for level, packages in enumerate(LEVELS) for package in packages}
FOLDERS = {"softcache/base": "base", "data": "data", "pipeline": "pipeline", "stages": "stages"}
FILES = {str(path.relative_to(ROOT)): path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8"), name) for name, path in FILES.items()}


def module_of(file: str) -> str:
    """`softcache/base/rng.py` -> `base.rng`, `pipeline/cache/__init__.py` -> `pipeline.cache`."""
    return file.removeprefix("softcache/").removesuffix(".py").removesuffix("/__init__").replace("/", ".")


MODULES = {module_of(file) for file in FILES}


def package_of(module: str) -> str:
    """The package of LEVELS that a module, or a package of modules, is in."""
    return module.partition(".")[0] if module.startswith(("base", "data")) else ".".join(module.split(".")[:2])


def our_imports(file: str) -> Iterator[tuple[str, ast.stmt]]:
    """Every module of softcache that a file imports, wherever in it, dotted below softcache."""
    own = module_of(file) if file.endswith("__init__.py") else module_of(file).rpartition(".")[0]
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.Import):
            yield from ((alias.name[10:], node) for alias in node.names if alias.name.startswith("softcache."))
        elif isinstance(node, ast.ImportFrom):
            package = f"softcache.{own}" if node.level else ""
            name = ".".join(filter(None, (package, node.module)))
            if name.startswith("softcache."):
                whole = (f"{name[10:]}.{alias.name}" for alias in node.names)
                yield from ((module if module in MODULES else name[10:], node) for module in whole)


def imports(tree: ast.AST) -> Iterator[tuple[str, ast.stmt]]:
    """Every module that is imported by its absolute name, wherever in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.module, node


def who_imports(library: str) -> set[str]:
    """library: a name, also with dots: `torch.utils.tensorboard` is that part of it alone."""
    return {name for name, tree in TREES.items() if any(f"{m}.".startswith(f"{library}.") for m, _ in imports(tree))}


def calls(name: str) -> Iterator[tuple[str, ast.Call]]:
    """Every call of something that ends in name: `torch.load` finds torch.load(…), `load` every ….load(…)."""
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ("." + ast.unparse(node.func)).endswith("." + name):
                yield file, node


# Packages


def test_these_tests_see_every_package() -> None:
    assert {"softcache/base/rng.py", "data/views/render.py", "pipeline/losses/hard.py", "stages/main.py"} <= set(FILES)
    assert {package_of(module) for module in MODULES} - {"pipeline", "stages"} == set(LEVEL)


def test_a_package_imports_those_below_it_alone() -> None:
    wrong, seen = [], 0
    for file in FILES:
        own = package_of(module_of(file))
        for module, node in our_imports(file):
            if (other := package_of(module)) != own:
                seen += 1
                if LEVEL[other] >= LEVEL[own]:
                    wrong.append(f"{file}:{node.lineno} imports {module}")
    assert wrong == []
    assert seen > 300


def test_the_one_import_package_is_softcache() -> None:
    for file, tree in TREES.items():
        assert not {m for m, _ in imports(tree) if m.partition(".")[0] in ("data", "pipeline", "stages")}, file


@pytest.mark.parametrize("folder", ["data", "pipeline", "stages"])
def test_no_folder_of_ours_can_be_imported_by_its_own_name(folder: str) -> None:
    """Also not from the top of a checkout, where it is found."""
    done = subprocess.run([sys.executable, "-c", f"import {folder}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"import softcache.{folder}" in done.stderr


def test_a_relative_import_stays_in_its_folder() -> None:
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                assert node.level <= 1, f"{file}:{node.lineno}"


def test_every_package_says_what_lives_there_and_where_to_begin() -> None:
    for file, tree in TREES.items():
        if file.endswith("__init__.py"):
            text = ast.get_docstring(tree) or ""
            assert "Begin with" in text, file
            assert len(text.splitlines()) > 1, file


@pytest.mark.parametrize(
    ("library", "doors"),
    [
        ("h5py", {"pipeline/cache/shards.py"}),
        (
            "click",
            {"stages/main.py", "stages/make_variables.py", "stages/cli/options.py", "stages/cli/run_command.py"},
        ),
        (
            "matplotlib",
            {
                "stages/inspect/plots.py",
                "stages/tune/plots.py",
                "stages/cli/plot_style.py",
                "stages/report/plots.py",
                "stages/report/task_plots.py",
            },
        ),
        ("jinja2", {"stages/report/page.py"}),
        ("torch.utils.tensorboard", {"stages/training/tensorboard.py"}),
        ("tensorboard", {"stages/training/tensorboard.py"}),
        ("safetensors", {"pipeline/models/checkpoint_files.py", "stages/runs/logits.py", "stages/export/formats.py"}),
        (
            "onnx",
            {
                "stages/export/onnx_model.py",
                "stages/export/quantize.py",
                "pipeline/models/other_frameworks/onnx_files.py",
            },
        ),
        (
            "onnxruntime",
            {
                "stages/export/onnx_model.py",
                "stages/export/quantize.py",
                "pipeline/models/other_frameworks/onnx_network.py",
            },
        ),
        ("onnxscript", {"stages/export/onnx_model.py"}),  # for its version alone: torch.onnx writes through it
        (
            "pyarrow",
            {
                "data/sources/files/hub_dataset.py",
                "data/sources/files/parquet.py",
                "stages/teacher_cache/teachers/logit_files.py",
            },
        ),
        ("datasets", {"data/sources/files/hub_dataset.py"}),
        (
            "torchvision",
            {"data/sources/cifar.py", "data/sources/mnist.py", "pipeline/models/archs/torchvision_models.py"},
        ),
        ("timm", {"pipeline/models/archs/timm_models.py"}),
        ("transformers", {"pipeline/models/archs/hf_models.py"}),
        ("huggingface_hub", {"pipeline/models/archs/hf_models.py", "pipeline/models/archs/timm_models.py"}),
    ],
)
def test_a_library_has_its_doors_and_no_other(library: str, doors: set[str]) -> None:
    assert who_imports(library) == doors


def test_progress_bars_are_for_commands_and_for_callers_who_want_one() -> None:
    bars = who_imports("tqdm")
    assert {file for file in bars if not file.startswith("stages/")} == {"softcache/base/progress.py"}


def test_modules_are_imported_by_a_name_in_a_string_only_for_a_users_own_code() -> None:
    assert {file for file, _ in calls("import_module")} == {"softcache/base/user_modules.py"}
    assert list(calls("__import__")) == []


# Nothing on disk is run


@pytest.mark.parametrize("library", ["dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml"])
def test_nothing_that_could_run_code_from_a_file_is_imported(library: str) -> None:
    assert who_imports(library) == set()


def test_pickle_is_at_most_named_for_its_error() -> None:
    for file in who_imports("pickle"):
        for node in ast.walk(TREES[file]):
            if isinstance(node, ast.ImportFrom) and node.module == "pickle":
                assert [alias.name for alias in node.names] == ["UnpicklingError"], file
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle":
                assert node.attr == "UnpicklingError", file


@pytest.mark.parametrize("function", ["torch.load", "get_state_dict"])
def test_weights_are_loaded_without_code(function: str) -> None:
    found = list(calls(function))
    assert found
    for file, call in found:
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert given.get("weights_only") == "True", f"{file}:{call.lineno}"


def test_arrays_are_loaded_without_code_and_torch_only_by_its_full_name() -> None:
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            assert not (isinstance(node, ast.keyword) and node.arg == "allow_pickle"), file
            if isinstance(node, ast.ImportFrom) and node.module in ("torch", "torch.hub", "torch.serialization"):
                assert not {"load", "load_state_dict_from_url"} & {alias.name for alias in node.names}, file


# Nothing in the data depends on a hidden state


def test_data_draw_no_number_from_a_generator() -> None:
    drawing = {"random", "rand", "randn", "randint", "randperm", "manual_seed", "default_rng", "shuffle"}
    for file, tree in TREES.items():
        if file.startswith(("data/", "softcache/base/")):
            assert not {m for m, _ in imports(tree)} & {"random", "numpy.random", "secrets"}, file
            used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
            assert not used & drawing, file


# --help


@pytest.mark.parametrize("command", ["", *commands.commands])
def test_help_comes_without_the_slow_libraries(command: str) -> None:
    arguments = [sys.executable, "-X", "importtime", "-m", "softcache", *filter(None, [command]), "--help"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert "Usage: softcache" in done.stdout
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert {"click", "softcache"} <= loaded
    assert loaded & {"torch", "torchvision", "numpy", "h5py", "sklearn", "scipy", "PIL", "matplotlib"} == set()


def words_of_help(command: str) -> set[str]:
    said = CliRunner().invoke(commands, [command, "--help"], terminal_width=10_000, max_content_width=10_000)
    assert said.exit_code == 0
    return set(re.split(r"[\s,;:|()\[\]]+", said.output.replace(". ", " ")))


def test_every_data_set_is_in_the_help_of_the_commands_that_take_one() -> None:
    from softcache.data.sources import SOURCES

    for command in ("teacher", "teacher-cache"):
        assert set(SOURCES) <= words_of_help(command)


def test_every_view_policy_and_codec_is_in_the_help_of_stage_one() -> None:
    from softcache.data.views.policy import VIEW_POLICIES
    from softcache.pipeline.cache.codecs import CODECS

    words = words_of_help("teacher-cache")
    assert set(VIEW_POLICIES) <= words
    assert set(CODECS) <= words


def test_every_arch_is_in_the_help_of_the_commands_that_build_one() -> None:
    from softcache.pipeline.models import MODELS

    depths = {name: int(name[6:]) for name in MODELS if re.fullmatch(r"resnet\d+", name)}
    shown = (set(MODELS) - set(depths)) | {f"resnet{min(depths.values())}…{max(depths.values())}"}
    for command in ("teacher", "teacher-cache", "student"):
        assert shown <= words_of_help(command)


# Files


def lines_of_code(file: str) -> int:
    """Lines that hold code: a docstring, a comment and an empty line are for the reader."""
    tree, text = TREES[file], FILES[file].read_text(encoding="utf-8").splitlines()
    prose = {line for line, words in enumerate(text, 1) if not words.strip() or words.strip().startswith("#")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            prose |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(text) - len(prose)


def test_no_file_has_more_than_300_lines_of_code() -> None:
    assert {name: n for name in FILES if (n := lines_of_code(name)) > 300} == {}


def test_no_name_stands_twice_in_a_table() -> None:
    """The second row would silently take the place of the first."""
    rows = 0
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Dict):
                keys = [key.value for key in node.keys if isinstance(key, ast.Constant)]
                rows += len(keys)
                assert len(keys) == len(set(keys)), f"{file}:{node.lineno}"
    assert rows > 50


def test_a_row_is_filed_under_its_own_name() -> None:
    from softcache.data.views.policy import VIEW_POLICIES
    from softcache.pipeline.losses import LOSSES

    for table in (VIEW_POLICIES, LOSSES):
        assert {name: row.name for name, row in table.items()} == {name: name for name in table}  # type: ignore[attr-defined]


def test_no_file_and_no_class_has_a_name_that_says_nothing() -> None:
    empty = re.compile(r"util|helper|common|manager|wrapper|engine|cfg|misc", re.IGNORECASE)
    for file, tree in TREES.items():
        names = [file, *(node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef))]
        assert not [name for name in names if empty.search(name)], file


def test_every_file_says_what_it_is_for() -> None:
    assert [name for name, tree in TREES.items() if not ast.get_docstring(tree)] == []
