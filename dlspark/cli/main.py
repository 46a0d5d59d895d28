"""The command ``dlspark``: parse arguments, run a command, and turn errors into one line and an exit code.

Exit codes: 0 success; 1 a run failed, or `doctor` found an error; 2 a setting or the data cannot work; 75 a run was
interrupted by SIGTERM and can be resumed; 130 interrupted by Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

from dlspark._require import extra, installed_version
from dlspark.cli import backends, doctor, evaluate, explore, output, prepare, study, train
from dlspark.cli.arguments import Parser
from dlspark.errors import (
    ConfigError,
    DataError,
    DlsparkError,
    MissingDependencyError,
    RunInterruptedError,
    WorkerError,
    did_you_mean,
)

_COMMANDS = (prepare, explore, train, evaluate, study, backends, doctor)
_FRAMEWORKS = ("tensorflow", "jax", "torch")
_EPILOG = """\
example:
  dlspark prepare photos/ store/photos --layout folders --image-size 224
  dlspark train store/photos --backend mirrored --workers 2 --epochs 5 --out runs/first
  dlspark evaluate runs/first/model.keras store/photos
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``dlspark`` with ``arguments``, by default those of the process; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # Set before TensorFlow is imported: its C++ messages on CPU features and missing GPUs are not for users.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    debug = "--debug" in arguments
    try:
        return _run(_parse(arguments), debug=debug)
    except RunInterruptedError as error:  # already logged as a warning
        return error.exit_code
    except SystemExit as leaving:  # --help and --version
        return leaving.code if isinstance(leaving.code, int) else 1
    except BrokenPipeError:  # a reader such as `head` has closed the pipe
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        if isinstance(error, KeyboardInterrupt):
            sys.stderr.write("dlspark: interrupted\n")
            return 130
        sys.stderr.write(f"dlspark: error: {_told(error)}\n")
        return 2 if isinstance(error, ConfigError | DataError | MissingDependencyError) or _lacks(error) else 1


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """The parser, and the parsers of the commands by name. No heavy package is imported."""
    parser = Parser(prog="dlspark", description="Train Keras 3 models on a Spark cluster.", epilog=_EPILOG)
    parser.add_argument("--version", action=_Version, nargs=0, default=argparse.SUPPRESS, help="show the version and exit")
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")
    for module in _COMMANDS:
        module.add_parser(commands)
    return parser, dict(commands.choices)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser, commands = build_parser()
    if not arguments:
        parser.print_help(sys.stderr)
        raise SystemExit(2)
    first = arguments[0]
    if first in commands:
        commands[first].refuse_unknown_options(arguments[1:])
    elif first.startswith("-"):
        parser.refuse_unknown_options(arguments[:1])
    else:
        raise ConfigError(f"There is no command {first!r}. {did_you_mean(first, commands)}")
    options, left = parser.parse_known_args(arguments)
    if left:
        raise ConfigError(f"{first} takes no {left[0]!r}. See: dlspark {first} --help")
    options.arguments = arguments
    return options


def _run(options: argparse.Namespace, *, debug: bool) -> int:
    with output.stdout_for_results() as results, output.logs_on_stderr(debug=debug):
        with _own_session_stopped():
            report: output.Report = options.run(options)
        output.write(report, options.format, results)
    return report.exit_code


class _Version(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        found = installed_version("dlspark") or "(not installed: run from a checkout)"
        sys.stdout.write(f"dlspark {found}\n")
        parser.exit()


def _told(error: Exception) -> str:
    """``error`` in one line, followed only by the traceback of a worker."""
    if isinstance(error, WorkerError):
        return str(error)
    if isinstance(error, DlsparkError):
        return " ".join(str(error).splitlines())
    if lacking := _lacks(error):
        return (
            f"The Keras backend {lacking!r} is not installed. Run: pip install {extra(lacking)!r}, or set KERAS_BACKEND "
            f"to an installed one of {', '.join(_FRAMEWORKS)}."
        )
    first = next(iter(str(error).strip().splitlines()), "")
    return f"unexpected {type(error).__name__}: {first} (--debug shows where)"


def _lacks(error: BaseException) -> str:
    """The framework that ``error`` reports as missing; empty for other errors."""
    return error.name or "" if isinstance(error, ModuleNotFoundError) and error.name in _FRAMEWORKS else ""


@contextlib.contextmanager
def _own_session_stopped() -> Iterator[None]:
    """Stop the Spark session that the block starts; an earlier one is kept."""
    before = _spark_context()
    try:
        yield
    finally:
        context = _spark_context()
        if context is not None and context is not before:
            from pyspark.sql import SparkSession

            # The JVM may be dead, and cancelled tasks log long errors; the important one is already reported.
            with contextlib.suppress(Exception):
                context.setLogLevel("OFF")
            with contextlib.suppress(Exception):
                (SparkSession.getActiveSession() or context).stop()


def _spark_context() -> Any:
    pyspark = sys.modules.get("pyspark")
    return None if pyspark is None else pyspark.SparkContext._active_spark_context
