"""Settings: which origin wins, and what each wrong value is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from libortho.errors import ConfigError
from libortho.settings import SETTINGS, resolve
from libortho.verdict import DEFAULT_MAX_PPL_RATIO, DEFAULT_MIN_PRIVACY_RATIO


def test_defaults_are_those_of_the_main_job() -> None:
    settings = resolve({}, {}, {})
    assert settings.model == "smollm2"
    assert settings.quantization_bits == 4
    assert settings.corpus == "enwiki"
    assert settings.profile == "gtx4050"
    assert settings.min_privacy_ratio == DEFAULT_MIN_PRIVACY_RATIO
    assert settings.max_ppl_ratio == DEFAULT_MAX_PPL_RATIO
    assert set(settings.origins.values()) == {"default"}


def test_the_command_line_beats_the_environment_beats_the_ini_file() -> None:
    line = {"model": "from-line"}
    environment = {"LIBORTHO_MODEL": "from-environment", "LIBORTHO_SEED": "1"}
    ini = {"libortho_model": "from-ini", "libortho_seed": "2", "libortho_corpus": "wikitext2"}
    settings = resolve(line, environment, ini)
    found = {key: (settings.values[key], settings.origins[key]) for key in settings.values}
    assert found["model"] == ("from-line", "command line")
    assert found["seed"] == (1, "LIBORTHO_SEED")
    assert found["corpus"] == ("wikitext2", "pytest.ini")
    assert found["device"] == ("auto", "default")


def test_empty_is_not_given() -> None:
    settings = resolve({"model": None}, {"LIBORTHO_MODEL": ""}, {"libortho_model": "from-ini"})
    assert settings.model == "from-ini"


def test_values_have_their_types() -> None:
    given = {"quantization_bits": "8", "cache_dir": "some/where", "max_ppl_ratio": "1.5"}
    settings = resolve(given | {"strict_model": "Yes", "canaries": "3"}, {}, {})
    assert settings.quantization_bits == 8
    assert settings.cache_dir == Path("some/where")
    assert settings.max_ppl_ratio == 1.5
    assert settings.strict_model is True
    assert settings.canaries == 3


BAD = [
    ("quantization-bits", "5"),
    ("quantization-bits", "four"),
    ("experiment", "3"),
    ("profile", "rtx9090"),
    ("canaries", "0"),
    ("canaries", "-1"),
    ("canaries", "2.5"),
    ("min-privacy-ratio", "0"),
    ("min-privacy-ratio", "nan"),
    ("min-privacy-ratio", "inf"),
    ("max-ppl-ratio", "-1"),
    ("max-ppl-ratio", "much"),
    ("seed", "-1"),
    ("seed", "x"),
    ("strict-model", "perhaps"),
]


@pytest.mark.parametrize(("name", "value"), BAD)
@pytest.mark.parametrize("origin", ["command line", "environment", "ini"])
def test_a_bad_value_is_refused_with_option_value_and_origin(
    name: str, value: str, origin: str
) -> None:
    (setting,) = (s for s in SETTINGS if s.name == name)
    line = {setting.key: value} if origin == "command line" else {}
    environment = {setting.variable: value} if origin == "environment" else {}
    ini = {setting.ini: value} if origin == "ini" else {}
    shown = {"command line": "command line", "environment": setting.variable, "ini": "pytest.ini"}
    with pytest.raises(ConfigError) as caught:
        resolve(line, environment, ini)
    message = str(caught.value)
    for part in (setting.option, repr(value), shown[origin]):
        assert part in message
    for choice in setting.choices:
        assert choice in message


def test_the_description_names_every_setting_and_its_origin() -> None:
    lines = resolve({"seed": "7"}, {}, {}).described()
    assert len(lines) == len(SETTINGS)
    assert "seed = 7 (command line)" in lines
    assert "model = smollm2 (default)" in lines


def test_a_record_file_is_described_without_its_folder() -> None:
    settings = resolve({"records": "/home/of/someone/secrets.jsonl"}, {}, {})
    assert settings.records == Path("/home/of/someone/secrets.jsonl")
    text = "\n".join(settings.described())
    assert "records = secrets.jsonl (command line)" in text
    assert "someone" not in text


def test_an_unknown_setting_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="modle"):
        _ = resolve({}, {}, {}).modle


def test_a_profile_without_a_card_runs_on_the_cpu() -> None:
    assert resolve({"profile": "cpu"}, {}, {}).device == "cpu"
    assert resolve({"profile": "cpu", "device": "cpu"}, {}, {}).device == "cpu"
    assert resolve({"profile": "rtx4090"}, {}, {}).device == "auto"
    with pytest.raises(ConfigError, match="--profile cpu has no card; found --device cuda:1"):
        resolve({"profile": "cpu", "device": "cuda:1"}, {}, {})
