"""A run's settings, and where each came from: command line, environment, ini file or default.

Knows names, types and limits; not pytest, which only hands over what it was given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ConfigError
from .methods import METHODS
from .profiles import PROFILES
from .verdict import DEFAULT_MAX_PPL_RATIO, DEFAULT_MIN_PRIVACY_RATIO


def _positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError("must be at least 1")
    return value


def _seed(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError("must not be negative")
    return value


def _ratio(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise ValueError("must be a finite number above 0")
    return value


def _flag(text: str) -> bool:
    known = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    if text.lower() not in known:
        raise ValueError("must be true or false")
    return known[text.lower()]


@dataclass(frozen=True)
class Setting:
    """One setting: `--name` on the command line, LIBORTHO_NAME, `libortho_name` in pytest.ini."""

    name: str
    parse: Callable[[str], Any]
    default: Any
    help: str
    choices: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return self.name.replace("-", "_")

    @property
    def option(self) -> str:
        return f"--{self.name}"

    @property
    def variable(self) -> str:
        return f"LIBORTHO_{self.key.upper()}"

    @property
    def ini(self) -> str:
        return f"libortho_{self.key}"


SETTINGS = (
    Setting("model", str, "smollm2", "registry name, hub id or local folder"),
    Setting("quantization-bits", int, 4, "bits of the lattice; 16 for none", ("4", "8", "16")),
    Setting("head-bits", int, None, "bits of embedding and head [16, or 8 to fit]", ("8", "16")),
    Setting("experiment", str, "all", "1: kill switch, 2: null test", ("1", "2", "all")),
    Setting("cache-dir", Path, None, "where downloads and artefacts are kept"),
    Setting("results-dir", Path, Path(), "where the results file is written"),
    Setting("report", Path, None, "write an HTML page of the results to this file"),
    Setting("profile", str, "gtx4050", "conditions of the run", tuple(PROFILES)),
    Setting("canaries", _positive_int, None, "planted records of each family [the profile's]"),
    Setting("records", Path, None, "your own records, JSON lines: id, prompt, secret"),
    Setting("checkpoint", Path, None, "audit this saved artefact instead of tuning one"),
    Setting("corpus", str, "enwiki", "enwiki, wikitext2, or a text file"),
    Setting(
        "min-privacy-ratio",
        _ratio,
        DEFAULT_MIN_PRIVACY_RATIO,
        "least lower 95 % limit of the privacy ratio",
    ),
    Setting(
        "max-ppl-ratio", _ratio, DEFAULT_MAX_PPL_RATIO, "largest perplexity ratio at alpha = 1"
    ),
    Setting("method", str, "ortho", "what an audit examines", ("all", *METHODS)),
    Setting("audit-records", _positive_int, 200, "planted records of an audit, five families"),
    Setting("relearn", _flag, False, "attack by fine-tuning as well: slow"),
    Setting(
        "require-verdict",
        str,
        "tested",
        "what an audit's verdict must be: private by construction, or also as far as tested",
        ("construction", "tested"),
    ),
    Setting("public-model", str, None, "audit a pair of checkpoints: what is handed out"),
    Setting("private-model", str, None, "audit a pair of checkpoints: the one that was tuned"),
    Setting("seed", _seed, 0, "seed of records and tuning"),
    Setting("device", str, "auto", "auto, cpu, cuda or cuda:N"),
    Setting("strict-model", _flag, False, "fail instead of taking a smaller model"),
    Setting("fresh", _flag, False, "measure everything anew, whatever an interrupted run has left"),
)

_OF_AN_AUDIT = (
    "model",
    "corpus",
    "min-privacy-ratio",
    "require-verdict",
    "relearn",
    "results-dir",
    "report",
    "seed",
    "device",
    "cache-dir",
)
AUDIT_SETTINGS = (
    *(setting for setting in SETTINGS if setting.name in _OF_AN_AUDIT),
    Setting("attacks", _flag, False, "attack artefacts as well, with a dose curve: slow"),
)
"""Those of the fixture `ortho_audit`; on the command line they begin with `--libortho-`."""


@dataclass(frozen=True)
class Settings:
    """Values by key, and where each came from: command line, variable, pytest.ini or default."""

    values: Mapping[str, Any]
    origins: Mapping[str, str]

    def __getattr__(self, key: str) -> Any:
        try:
            return self.values[key]
        except KeyError:
            raise AttributeError(key) from None

    def described(self) -> list[str]:
        """Every setting in force, `name = value (origin)`; a record file by name alone."""
        shown = dict(self.values)
        if shown["records"] is not None:
            shown["records"] = Path(shown["records"]).name
        return [f"{key} = {value} ({self.origins[key]})" for key, value in shown.items()]


def resolve(
    command_line: Mapping[str, Any],
    environment: Mapping[str, str],
    ini: Mapping[str, str],
    settings: Sequence[Setting] = SETTINGS,
) -> Settings:
    """Settle every setting: the command line wins over the environment, that over the ini file.

    All three map a setting's key, variable or ini name to text; None or "" is "not given". Raises
    `ConfigError` for a value that can't be used, with where it was found.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for setting in settings:
        given = (
            (command_line.get(setting.key), "command line"),
            (environment.get(setting.variable), setting.variable),
            (ini.get(setting.ini), "pytest.ini"),
        )
        text, origin = next(((t, o) for t, o in given if t not in (None, "")), (None, "default"))
        values[setting.key] = setting.default if text is None else _parsed(setting, text, origin)
        origins[setting.key] = origin
    if "profile" in values and not PROFILES[values["profile"]].vram_gib_total:  # it has no card
        if values["device"] not in ("auto", "cpu"):
            raise ConfigError(
                f"--profile {values['profile']} has no card; found --device {values['device']}. "
                "Choose another profile, or leave the device out."
            )
        values["device"] = "cpu"
    return Settings(values, origins)


def _parsed(setting: Setting, text: Any, origin: str) -> Any:
    text = str(text)
    if setting.choices and text not in setting.choices:
        raise ConfigError(
            f"{setting.option} must be one of {', '.join(setting.choices)}; found {text!r} "
            f"({origin})."
        )
    try:
        return setting.parse(text)
    except ValueError as error:
        raise ConfigError(f"{setting.option}: {text!r} ({origin}) is no value: {error}.") from error


def join_options(arguments: Sequence[str]) -> list[str]:
    """Command-line arguments with `--option value` of ours written as `--option=value`."""
    takes_value = {setting.option for setting in SETTINGS if setting.default is not False}
    joined: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument == "--":
            return [*joined, argument, *rest]
        if argument in takes_value:
            value = next(rest, None)
            joined.append(argument if value is None else f"{argument}={value}")
        else:
            joined.append(argument)
    return joined
