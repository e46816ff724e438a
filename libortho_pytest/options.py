"""The options of an audit in somebody's repository: names, defaults as they are shown, origins.

Knows text alone. What a value may be is said in `libortho.settings`, which a session imports when
it audits something; names carry a prefix, because `--device` or `--seed` may be another plugin's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Option:
    """One setting: `--libortho-name`, the variable LIBORTHO_NAME, `libortho_name` in an ini file.

    default: as it is shown; `libortho.settings` has the value
    takes_value: False for a flag
    """

    name: str
    default: str
    help: str
    takes_value: bool = True

    @property
    def key(self) -> str:
        return self.name.replace("-", "_")

    @property
    def flag(self) -> str:
        return f"--libortho-{self.name}"

    @property
    def variable(self) -> str:
        return f"LIBORTHO_{self.key.upper()}"

    @property
    def ini(self) -> str:
        return f"libortho_{self.key}"


OPTIONS = (
    Option("model", "smollm2", "the public model that artefacts were made from"),
    Option("corpus", "enwiki", "the text that artefacts were calibrated on"),
    Option("min-privacy-ratio", "8", "least lower 95 % limit of the privacy ratio"),
    Option("require-verdict", "tested", "what is private enough: construction, or also tested"),
    Option("attacks", "off", "attack artefacts as well, with a dose curve: slow", False),
    Option("relearn", "off", "attack by fine-tuning as well: slower", False),
    Option("results-dir", "none is written", "write a results file into this folder"),
    Option("report", "none is written", "write an HTML page of the results to this file"),
    Option("seed", "0", "of generated twins and of attacks"),
    Option("device", "auto", "auto, cpu, cuda or cuda:N"),
    Option("cache-dir", "the user's", "where downloads and controls are kept"),
)


@dataclass(frozen=True)
class Given:
    """A setting's value as text, and where it stands."""

    text: str
    origin: str


def given(
    command_line: Mapping[str, str | None],
    environment: Mapping[str, str],
    ini: Mapping[str, str],
    ini_name: str,
) -> dict[str, Given]:
    """The options that were given at all, by key, each with its strongest origin.

    The command line wins over the environment, that over the ini file; "" is not given. The three
    map an option's key, variable and ini name to text.
    """
    found = {}
    for option in OPTIONS:
        candidates = (
            (command_line.get(option.key), "command line"),
            (environment.get(option.variable), option.variable),
            (ini.get(option.ini), ini_name),
        )
        for text, origin in candidates:
            if text:
                found[option.key] = Given(text, origin)
                break
    return found


def described(found: Mapping[str, Given]) -> list[str]:
    """Every option in force, `name = value (origin)`."""
    shown = []
    for option in OPTIONS:
        value = found.get(option.key, Given(option.default, "default"))
        shown.append(f"{option.key} = {value.text} ({value.origin})")
    return shown
