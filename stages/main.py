"""`python -m softcache`, or `softcache`: the commands. PyTorch is loaded inside a command, so that --help is quick."""

import signal
import sys
from typing import Any

import click

from softcache import __version__
from softcache.stages.cli.configs import (
    ArchiveConfig,
    BlendConfig,
    BornAgainConfig,
    CacheConfig,
    CheckConfig,
    EvaluateConfig,
    ExportConfig,
    InspectConfig,
    ListConfig,
    MethodsConfig,
    PredictConfig,
    ReportConfig,
    StudentsConfig,
    TeacherConfig,
    TuneConfig,
)
from softcache.stages.cli.malloc import keep_large_blocks
from softcache.stages.cli.options import add_options, read_options
from softcache.stages.distributed.ranks import check_command, reports_errors


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
@click.pass_context
def commands(context: click.Context, /) -> None:
    """Run a teacher once, keep what it said, train as many students as you like."""
    check_command(context.invoked_subcommand)


@commands.command("teacher")
@add_options(TeacherConfig)
@click.pass_context
def teacher(context: click.Context, /, **_: Any) -> None:
    """Train a teacher, for those who have none."""
    from .teacher import command as stage

    stage.run(*read_options(context, TeacherConfig))


@commands.command("teacher-cache")
@add_options(CacheConfig)
@click.pass_context
def teacher_cache(context: click.Context, /, **_: Any) -> None:
    """Stage one: run the teacher once over a transfer set and keep its logits and features."""
    from .teacher_cache import command as stage

    stage.run(read_options(context, CacheConfig)[0])


@commands.command("student")
@add_options(StudentsConfig)
@click.pass_context
def student(context: click.Context, /, **_: Any) -> None:
    """Stage two: train a student, or several from one stream, from a cache. No teacher is needed, or looked for."""
    from .student import several_students as stage

    stage.run(*read_options(context, StudentsConfig))


@commands.command("blend")
@add_options(BlendConfig)
@click.pass_context
def blend(context: click.Context, /, **_: Any) -> None:
    """What several caches make of one another, before any student is trained."""
    from .student import blend as stage

    stage.run(read_options(context, BlendConfig)[0])


@commands.command("born-again")
@add_options(BornAgainConfig)
@click.pass_context
def born_again(context: click.Context, /, **_: Any) -> None:
    """A chain of students, each the teacher of the next; --archs makes it one of teacher assistants."""
    from .student import born_again as stage

    stage.run(*read_options(context, BornAgainConfig))


@commands.command("methods")
@add_options(MethodsConfig)
@click.pass_context
def methods(context: click.Context, /, **_: Any) -> None:
    """Train one arch by every loss on one cache, and compare what each gains and costs."""
    from .student import methods as stage

    stage.run(*read_options(context, MethodsConfig))


@commands.command("tune")
@add_options(TuneConfig)
@click.pass_context
def tune(context: click.Context, /, **_: Any) -> None:
    """Search loss weights and training settings: many students of one cache, the best on validation."""
    from .tune import command as stage

    stage.run(*read_options(context, TuneConfig))


@commands.command("losses")
@add_options(ListConfig)
@click.pass_context
def losses(context: click.Context, /, **_: Any) -> None:
    """Every loss, its knobs and what it reads."""
    from .student import list_losses as stage

    stage.run(read_options(context, ListConfig)[0])


@commands.command("recipes")
@add_options(ListConfig)
@click.pass_context
def recipes(context: click.Context, /, **_: Any) -> None:
    """Published recipes for --recipe, with their sources."""
    from .student import recipes as stage

    stage.run(read_options(context, ListConfig)[0])


@commands.command("evaluate")
@click.argument("run")
@add_options(EvaluateConfig)
@click.pass_context
def evaluate(context: click.Context, /, run: str, **_: Any) -> None:
    """The figures of the student in the folder RUN, from its weights."""
    from .student import evaluate as stage

    stage.run(run, *read_options(context, EvaluateConfig))


@commands.command("export")
@click.argument("run")
@add_options(ExportConfig)
@click.pass_context
def export(context: click.Context, /, run: str, **_: Any) -> None:
    """The student in the folder RUN as ONNX, pt2 and safetensors files, each checked, with a model card."""
    from .export import command as stage

    stage.run(run, *read_options(context, ExportConfig))


@commands.command("predict")
@click.argument("model")
@click.argument("images", nargs=-1, required=True)
@add_options(PredictConfig)
@click.pass_context
def predict(context: click.Context, /, model: str, images: tuple[str, ...], **_: Any) -> None:
    """What the exported student in the file MODEL says of PICTURES."""
    from .export import predict as stage

    stage.run(model, images, read_options(context, PredictConfig)[0])


@commands.command("compare")
@click.argument("runs", nargs=-1, required=True)
@add_options(ListConfig)
@click.pass_context
def compare(context: click.Context, /, runs: tuple[str, ...], **_: Any) -> None:
    """Finished students in the folders RUNS side by side: figures, settings, and whether they differ beyond chance."""
    from .compare import command as stage

    stage.run(runs, read_options(context, ListConfig)[0])


@commands.command("report")
@click.argument("runs", nargs=-1)
@add_options(ReportConfig)
@click.pass_context
def report(context: click.Context, /, runs: tuple[str, ...], **_: Any) -> None:
    """The students in the folders RUNS, all under runs/ when none is named, as one page to look at."""
    from .report import command as stage

    stage.run(runs, read_options(context, ReportConfig)[0])


@commands.command("check-cache")
@click.argument("cache")
@add_options(CheckConfig)
@click.pass_context
def check_cache(context: click.Context, /, cache: str, **_: Any) -> None:
    """Whether the cache in the folder CACHE is whole. Exit code 0 if it is, 1 if not."""
    from .check_cache import command as stage

    stage.run(cache, read_options(context, CheckConfig)[0])


@commands.command("inspect")
@click.argument("cache")
@add_options(InspectConfig)
@click.pass_context
def inspect(context: click.Context, /, cache: str, **_: Any) -> None:
    """What in the teacher of the cache in the folder CACHE matters: taps, channels, classes, temperatures."""
    from .inspect import command as stage

    stage.run(cache, read_options(context, InspectConfig)[0])


@commands.command("cache-pack")
@click.argument("cache")
@click.argument("file")
@add_options(ArchiveConfig)
@click.pass_context
def cache_pack(context: click.Context, /, cache: str, file: str, **_: Any) -> None:
    """Put the cache in the folder CACHE into one tar FILE, every byte checked on the way."""
    from .check_cache import archive as stage

    stage.run_pack(cache, file, read_options(context, ArchiveConfig)[0])


@commands.command("cache-unpack")
@click.argument("file")
@click.argument("cache")
@add_options(ArchiveConfig)
@click.pass_context
def cache_unpack(context: click.Context, /, file: str, cache: str, **_: Any) -> None:
    """Take a cache out of a tar FILE into the folder CACHE, every byte checked before it counts."""
    from .check_cache import archive as stage

    stage.run_unpack(file, cache, read_options(context, ArchiveConfig)[0])


def main(arguments: list[str] | None = None) -> None:
    """Run a command and exit: 0 done, 1 refused or damaged, 2 wrong command, 130 interrupted.

    A user's slip, a full disk and Ctrl-C each get one line; SIGTERM, as schedulers send it, is a Ctrl-C. A mistake of
    ours gets its traceback.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    keep_large_blocks()
    try:
        commands.main(arguments, prog_name="softcache", standalone_mode=False)
        return
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except click.ClickException as error:
        if reports_errors():
            error.show()
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        if reports_errors():
            click.echo("Stopped.", err=True)
        sys.exit(130)
    except Exception as error:
        line, code = _in_one_line(error)
        if not code and reports_errors():
            raise
        text = "".join(c if c.isprintable() or c == "\n" else "?" for c in line)  # it may quote a hostile file
        if reports_errors():
            click.echo(f"Error: {text}", err=True)
        sys.exit(code or 1)


def _in_one_line(error: Exception) -> tuple[str, int]:
    """What to print and the exit code; code 0 for what is no slip of the user's."""
    from softcache.base.errors import CacheError, Interrupted, UsageError, is_interrupt

    if isinstance(error, Interrupted):
        return str(error), 130
    if is_interrupt(error):
        return "stopped", 130
    for kind, code in ((CacheError, 1), (UsageError, 2)):
        if isinstance(error, kind):
            return str(error), code
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error) or "out of memory" in str(error):
        return "out of memory: what was finished is kept. A smaller --batch-size takes less", 1
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return f"--compile: the network cannot be compiled here ({why[:120]}): leave it out", 1
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename or 'while writing'}", 1
    return "", 0


if __name__ == "__main__":
    main()
