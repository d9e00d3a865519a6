"""`softcache`, or `python -m softcache`: the commands. PyTorch is imported inside a command, so that --help is
quick."""

import signal
import sys
from typing import Any, ClassVar

import click

from softcache import __version__
from softcache.base.current_folder import search_current_folder
from softcache.stages.cli.configs import (
    ArchiveConfig,
    BlendConfig,
    BornAgainConfig,
    CacheConfig,
    CheckConfig,
    EvaluateConfig,
    ExportConfig,
    HeadConfig,
    InspectConfig,
    ListConfig,
    MethodsConfig,
    PlanConfig,
    PredictConfig,
    ReportConfig,
    StudentsConfig,
    TeacherConfig,
    TuneConfig,
)
from softcache.stages.cli.malloc import keep_large_blocks
from softcache.stages.cli.openmp import let_threads_sleep
from softcache.stages.cli.options import Invocation, SectionedGroup, add_options, read_options
from softcache.stages.cli.run_command import run_command
from softcache.stages.cli.typed_command import remember_typed_command
from softcache.stages.distributed.ranks import check_command


class Commands(SectionedGroup):
    """The commands, by what they are for."""

    sections: ClassVar[dict[str, tuple[str, ...]]] = {
        "Make a cache": (
            "plan",
            "teacher",
            "teacher-cache",
            "head-cache",
            "check-cache",
            "cache-pack",
            "cache-unpack",
        ),
        "Train students": ("student", "born-again", "tune", "methods"),
        "Choose what to train": ("losses", "recipes", "blend", "inspect"),
        "Measure and use students": ("evaluate", "compare", "report", "export", "predict"),
    }


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
@click.pass_context
def commands(context: click.Context, /) -> None:
    """Offline knowledge distillation: run a teacher once, cache its outputs, train any number of students."""
    check_command(context.invoked_subcommand)


@commands.command("plan")
@add_options(PlanConfig)
@click.pass_context
def plan(context: click.Context, /, **_: Any) -> None:
    """Say what a cache will take, before anything is written. Bytes, hours, memory, and what fits a budget."""
    from .plan import command as stage

    stage.run(read_options(context, PlanConfig)[0])


@commands.command("teacher")
@add_options(TeacherConfig)
@click.pass_context
def teacher(context: click.Context, /, **_: Any) -> None:
    """Train a teacher."""
    from .teacher import command as stage

    stage.run(*read_options(context, TeacherConfig))


@commands.command("teacher-cache")
@add_options(CacheConfig)
@click.pass_context
def teacher_cache(context: click.Context, /, **_: Any) -> None:
    """Run a teacher once and write its outputs to a cache. Logits and layer features of every view of a transfer
    set."""
    from .teacher_cache import command as stage

    stage.run(read_options(context, CacheConfig)[0])


@commands.command("student")
@add_options(StudentsConfig)
@click.pass_context
def student(context: click.Context, /, **_: Any) -> None:
    """Train students from a cache. No teacher is needed. Several students read each batch once."""
    from .student import several_students as stage

    stage.run(*read_options(context, StudentsConfig))


@commands.command("blend")
@add_options(BlendConfig)
@click.pass_context
def blend(context: click.Context, /, **_: Any) -> None:
    """Compare ways to combine several teachers. Nothing is trained."""
    from .student import blend as stage

    stage.run(read_options(context, BlendConfig)[0])


@commands.command("born-again")
@add_options(BornAgainConfig)
@click.pass_context
def born_again(context: click.Context, /, **_: Any) -> None:
    """Train a chain of students, each the next one's teacher. With --archs: a chain of teacher assistants."""
    from .student import born_again as stage

    stage.run(*read_options(context, BornAgainConfig))


@commands.command("methods")
@add_options(MethodsConfig)
@click.pass_context
def methods(context: click.Context, /, **_: Any) -> None:
    """Train one arch by every loss and compare gains and costs."""
    from .student import methods as stage

    stage.run(*read_options(context, MethodsConfig))


@commands.command("tune")
@add_options(TuneConfig)
@click.pass_context
def tune(context: click.Context, /, **_: Any) -> None:
    """Search loss weights and training options. Trains many students of one cache; the best on validation wins."""
    from .tune import command as stage

    stage.run(*read_options(context, TuneConfig))


@commands.command("losses")
@add_options(ListConfig)
@click.pass_context
def losses(context: click.Context, /, **_: Any) -> None:
    """List every loss, its parameters and what it reads."""
    from .student import list_losses as stage

    stage.run(read_options(context, ListConfig)[0])


@commands.command("recipes")
@add_options(ListConfig)
@click.pass_context
def recipes(context: click.Context, /, **_: Any) -> None:
    """List the published recipes, with their sources."""
    from .student import recipes as stage

    stage.run(read_options(context, ListConfig)[0])


@commands.command("evaluate")
@click.argument("run")
@add_options(EvaluateConfig)
@click.pass_context
def evaluate(context: click.Context, /, run: str, **_: Any) -> None:
    """Measure the student in the folder RUN again."""
    from .student import evaluate as stage

    stage.run(run, *read_options(context, EvaluateConfig))


@commands.command("export")
@click.argument("run")
@add_options(ExportConfig)
@click.pass_context
def export(context: click.Context, /, run: str, **_: Any) -> None:
    """Export a student as ONNX, pt2 and safetensors files. RUN: the folder of its run. Each file is checked; a model
    card goes with them."""
    from .export import command as stage

    stage.run(run, *read_options(context, ExportConfig))


@commands.command("predict")
@click.argument("model")
@click.argument("images", nargs=-1, required=True)
@add_options(PredictConfig)
@click.pass_context
def predict(context: click.Context, /, model: str, images: tuple[str, ...], **_: Any) -> None:
    """Run an exported student, the file MODEL, on IMAGES. One of rows of numbers takes .npy files."""
    from .export import predict as stage

    stage.run(model, images, *read_options(context, PredictConfig))


@commands.command("compare")
@click.argument("runs", nargs=-1, required=True)
@add_options(ListConfig)
@click.pass_context
def compare(context: click.Context, /, runs: tuple[str, ...], **_: Any) -> None:
    """Compare students and test whether they differ. RUNS: folders of finished runs."""
    from .compare import command as stage

    stage.run(runs, read_options(context, ListConfig)[0])


@commands.command("report")
@click.argument("runs", nargs=-1)
@add_options(ReportConfig)
@click.pass_context
def report(context: click.Context, /, runs: tuple[str, ...], **_: Any) -> None:
    """Write one page about many runs. RUNS: their folders; all under runs/ when none is named."""
    from .report import command as stage

    stage.run(runs, read_options(context, ReportConfig)[0])


@commands.command("check-cache")
@click.argument("cache")
@add_options(CheckConfig)
@click.pass_context
def check_cache(context: click.Context, /, cache: str, **_: Any) -> None:
    """Check every byte of a cache. CACHE: its folder. Exit code 0: intact, 1: damaged."""
    from .check_cache import command as stage

    stage.run(cache, read_options(context, CheckConfig)[0])


@commands.command("head-cache")
@click.argument("cache")
@add_options(HeadConfig)
@click.pass_context
def head_cache(context: click.Context, /, cache: str, **_: Any) -> None:
    """Make the cache of a classifier of a cache of embeddings. CACHE: its folder. The teacher does not run again."""
    from .head_cache import command as stage

    stage.run(cache, read_options(context, HeadConfig)[0])


@commands.command("inspect")
@click.argument("cache")
@add_options(InspectConfig)
@click.pass_context
def inspect(context: click.Context, /, cache: str, **_: Any) -> None:
    """Measure which layers, channels and classes matter. CACHE: the folder of a cache."""
    from .inspect import command as stage

    stage.run(cache, read_options(context, InspectConfig)[0])


@commands.command("cache-pack")
@click.argument("cache")
@click.argument("file")
@add_options(ArchiveConfig)
@click.pass_context
def cache_pack(context: click.Context, /, cache: str, file: str, **_: Any) -> None:
    """Pack a cache into one tar file. CACHE: its folder. Every byte is checked."""
    from .check_cache import archive as stage

    stage.run_pack(cache, file, read_options(context, ArchiveConfig)[0])


@commands.command("cache-unpack")
@click.argument("file")
@click.argument("cache")
@add_options(ArchiveConfig)
@click.pass_context
def cache_unpack(context: click.Context, /, file: str, cache: str, **_: Any) -> None:
    """Unpack a cache from a tar file. CACHE: the new folder. Every byte is checked."""
    from .check_cache import archive as stage

    stage.run_unpack(file, cache, read_options(context, ArchiveConfig)[0])


def main(arguments: list[str] | None = None) -> None:
    """Run a command and exit.

    An error of the user or of a network of theirs, a full disk and Ctrl-C each get one line, with --traceback below
    its traceback; SIGTERM, which schedulers send, is treated as Ctrl-C. An error of this program gets its traceback.
    Closed standard streams, and a reader that ends first, change nothing but what is printed.

    Args:
        arguments: of the command line; those of the process when not given.

    Raises:
        SystemExit: code 0: done, 1: refused or damaged, 2: wrong command line, 130: interrupted.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    keep_large_blocks()
    let_threads_sleep()
    search_current_folder()
    remember_typed_command(sys.argv[1:] if arguments is None else arguments)
    invocation = Invocation()
    run_command(
        lambda: commands.main(arguments, prog_name="softcache", standalone_mode=False, obj=invocation), invocation
    )


if __name__ == "__main__":
    main()
