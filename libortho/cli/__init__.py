"""The command line: `libortho COMMAND`, or `python -m libortho COMMAND`.

Knows which groups of commands there are, and how a command ends. A new group is a module with
`add_commands` that is named in `GROUPS`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from libortho.errors import OrthoError

from . import artefacts, audit, machine, plan, results
from .commands import EXIT_INTERRUPTED, EXIT_REFUSED, REFUSED_AND_INTERRUPTED
from .output import note

GROUPS = (machine, plan, artefacts, audit, results)
EXIT_BROKEN_PIPE = 141


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; `arguments` defaults to the process's own.

    An error of libortho's own is one paragraph on standard error, and 2; an interrupt is 130. Where
    the reader of the output went away (`| head`), it is 141, as the shell says of other programs.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    options.command_line = ("libortho", *arguments)
    try:
        code: int = options.run(options)
        sys.stdout.flush()
    except OrthoError as error:
        note(" ".join(str(error).split()))
        return EXIT_REFUSED
    except KeyboardInterrupt:
        note("interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # So that the interpreter has nothing to flush, and to complain about, when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    return code


def _parser() -> argparse.ArgumentParser:
    installed = Path(sys.argv[0]).stem == "libortho"
    parser = argparse.ArgumentParser(
        prog="libortho" if installed else "python -m libortho",
        description="Split a language model into a base and a private stream behind one switch, "
        "and show what was measured of it.",
        epilog="`COMMAND --help` shows examples. Exit codes: 0 done or yes; 1 the answer is no "
        f"(plan, fingerprint, audit, compare); {REFUSED_AND_INTERRUPTED}.",
    )
    parser.add_argument("--version", action="version", version=f"libortho {_version()}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for group in GROUPS:
        group.add_commands(commands)
    return parser


def _version() -> str:
    try:
        return importlib.metadata.version("libortho")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"
