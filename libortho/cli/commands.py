"""How a command is declared: parser, examples, exit codes, and the options that several share."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

EXIT_DONE = 0
EXIT_NO = 1
EXIT_REFUSED = 2
EXIT_INTERRUPTED = 130

REFUSED_AND_INTERRUPTED = (
    "2 refused, with one paragraph on standard error that says why; 130 interrupted"
)

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]
else:
    Commands = argparse._SubParsersAction

PROGRAM = "libortho"


def add_command(
    commands: Commands,
    name: str,
    run: Callable[[argparse.Namespace], int],
    what: str,
    *,
    examples: Sequence[str],
    more: str = "",
    exit_codes: str = "0 done",
) -> argparse.ArgumentParser:
    """A parser for one command, with its help.

    Args:
        commands: where it is added.
        name: the command.
        run: what is called with the options; returns the exit code.
        what: one line, for the list of commands too.
        examples: command lines without the program's name.
        more: a paragraph for its own help.
        exit_codes: those of its own, besides 2 and 130.
    """
    shown = "\n".join(f"  {PROGRAM} {example}" for example in examples)
    parser = commands.add_parser(
        name,
        help=what,
        description=f"{what[:1].upper()}{what[1:]}." + (f"\n\n{more}" if more else ""),
        epilog=f"examples:\n{shown}\n\nexit codes: {exit_codes}; {REFUSED_AND_INTERRUPTED}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def add_json(parser: argparse.ArgumentParser) -> None:
    """`--json`."""
    parser.add_argument("--json", action="store_true", help="write JSON instead of text")


def add_device(parser: argparse.ArgumentParser) -> None:
    """`--device`."""
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)"
    )


def add_cache_dir(parser: argparse.ArgumentParser) -> None:
    """`--cache-dir`."""
    parser.add_argument(
        "--cache-dir",
        type=Path,
        metavar="FOLDER",
        help="where downloads are kept (default: $LIBORTHO_CACHE, or the user's cache folder)",
    )


def finite_float(text: str) -> float:
    """An argument that must be a finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def positive_float(text: str) -> float:
    """An argument that must be a finite number above 0."""
    value = finite_float(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def positive_int(text: str) -> int:
    """An argument that must be a whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value
