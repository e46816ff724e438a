"""The model card, README.md, that lies beside an artefact's weights.

Knows manifests and results; measures and judges nothing. What it says of the base is a function of
public inputs, so that the card is the same whether a private stream lies beside it or not.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData

from .errors import ArtifactError
from .files import atomic_write_text
from .layout import BASE_MANIFEST, FORMAT_VERSION, PRIVATE_FILE, verified_manifest

if TYPE_CHECKING:
    from .results import ArmResult, KillSwitchResult, NullTestResult, Results

CARD_FILE = "README.md"

# Jinja; huggingface_hub puts the metadata in front. Values come escaped.
_TEMPLATE = """\
---
{{ card_data }}
---

# {{ architecture }}, separated by libortho

Each linear weight of this model is `base + residual + alpha * private`. Base and residual, in
`base.safetensors`, were computed from public weights and public text alone. The private stream, if
there is one, holds what was learned from private records; at alpha = 0 it is switched off.

**Keep `{{ private_file }}` as you would keep the records: whoever holds it holds the secrets.** A
folder to publish has none; `libortho.export_base` writes such a folder.

## Use

```
pip install libortho
```

```python
import libortho  # before from_pretrained: it brings the quantiser "ortho"
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("this folder")
libortho.set_alpha(model, 0.0)  # if there is a private stream: as if never trained on the records
```

## Recipe

| | |
|---|---|
{% for name, value in recipe.items() -%}
| {{ name }} | {{ value }} |
{% endfor %}
## Fingerprint

`{{ fingerprint }}`

It is the SHA-256 of everything that alpha = 0 computes with, and the same for any records and for
none. `libortho.base_fingerprint("this folder")` computes it anew.

## Measured

{% for paragraph in measured -%}
{{ paragraph }}

{% endfor -%}
"""

_NOTHING_MEASURED = (
    "Nothing was measured on this artefact yet. `pytest -m gtx4050 --checkpoint FOLDER` does it, "
    "and `libortho.model_card(FOLDER, RESULTS)` puts the verdict here."
)


def model_card(
    folder: str | Path,
    results: Results | str | Path | None = None,
    *,
    base_model: str | None = None,
    license: str | None = None,
) -> Path:
    """Write the card of an artefact anew, with measured verdicts if there are any; its path.

    results: a results record or its file; it must be of this base, by fingerprint
    base_model: hub id of the model that was separated
    license: the weights' licence, as the hub spells it

    Raises `ArtifactError` for a folder that `load` refuses, and for results of another base or
    without an experiment.
    """
    folder = Path(folder)
    manifest = verified_manifest(folder, BASE_MANIFEST)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if isinstance(results, (str, Path)):
        # Not at the top: whoever saves an artefact would import all statistics with it.
        from .results import read_results  # noqa: PLC0415

        results = read_results(results)
    if results is not None:
        _check_results(results, manifest["base_fingerprint"], folder)
    text = render(manifest, config, results, base_model=base_model, license=license)
    atomic_write_text(folder / CARD_FILE, text)
    return folder / CARD_FILE


def render(
    manifest: Mapping[str, Any],
    config: Mapping[str, Any],
    results: Results | None = None,
    *,
    base_model: str | None = None,
    license: str | None = None,
) -> str:
    """The card's text, from `libortho.json`, `config.json` and what was measured."""
    architecture = (config.get("architectures") or ["A language model"])[0]
    recipe = {"format version": FORMAT_VERSION, "dtype of the other weights": manifest["dtype"]}
    recipe |= {name.replace("_", " "): value for name, value in manifest["separation"].items()}
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["libortho", f"{manifest['separation']['bits']}-bit"],
        base_model=base_model,
        license=license,
    )
    card = ModelCard.from_template(
        data,
        template_str=_TEMPLATE,
        architecture=_plain(architecture),
        private_file=PRIVATE_FILE,
        recipe={_plain(name): _plain(value) for name, value in recipe.items()},
        fingerprint=manifest["base_fingerprint"],
        measured=_measured(results),
    )
    return str(card).rstrip() + "\n"


def _check_results(results: Results, fingerprint: str, folder: Path) -> None:
    first, second = results.exp1_kill_switch, results.exp2_null_test
    if first is None and second is None:
        raise ArtifactError(
            "these results hold no experiment, so there is no verdict to put on the card of "
            f"{folder}. Give the file of a run of experiment 1, 2 or both."
        )
    if first is not None and first.base_fingerprint != fingerprint:
        raise ArtifactError(
            f"these results are of another base than {folder}: its fingerprint is "
            f"{fingerprint[:16]}... and theirs {first.base_fingerprint[:16]}... Give results that "
            "were measured on this artefact, with --checkpoint."
        )


def _measured(results: Results | None) -> list[str]:
    if results is None:
        return [_NOTHING_MEASURED]
    paragraphs = []
    if results.exp1_kill_switch is not None:
        paragraphs += _kill_switch(results.exp1_kill_switch)
    if results.exp2_null_test is not None:
        paragraphs += _null_test(results.exp2_null_test)
        if results.exp1_kill_switch is None:
            paragraphs.append(
                "Experiment 2 alone states no fingerprint: that it was measured on this artefact "
                "is the author's word."
            )
    return paragraphs


def _kill_switch(result: KillSwitchResult) -> list[str]:
    rows = [
        ("records planted / twins", f"{result.n_planted} / {result.n_twins}"),
        ("extracted at alpha = 1", result.hits_alpha1),
        ("extracted at alpha = 0", result.hits_alpha0),
        ("privacy ratio, 95 % lower limit", _figure(result.privacy_ratio_lower95, 2)),
        ("loss on planted secrets at alpha = 0, nats/token", _figure(result.loss_planted_alpha0)),
        ("loss on twins at alpha = 0, nats/token", _figure(result.loss_twins_alpha0)),
    ]
    return [
        f"**Kill switch: {result.verdict}.** {_plain(result.verdict_reason)}.",
        _table(("kill switch", ""), rows),
    ]


def _null_test(result: NullTestResult) -> list[str]:
    def row(name: str, arm: ArmResult) -> tuple[Any, ...]:
        interval = f"{_figure(arm.ratio_low95)} to {_figure(arm.ratio_high95)}"
        bits = _figure(arm.bits_per_linear_weight)
        return name, _figure(arm.ppl), _figure(arm.ratio, 4), interval, bits

    return [
        f"**Null test: {result.verdict}.** {_plain(result.verdict_reason)}. Measured on "
        f"{_plain(result.corpus)}, {result.windows} windows of {result.window_tokens} tokens.",
        _table(
            ("arm", "perplexity", "ratio", "95 % interval", "bits/weight"),
            [row(name, arm) for name, arm in result.arms.items()],
        ),
    ]


def _table(header: tuple[Any, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(_plain, line))} |" for line in lines)


def _figure(value: float | None, digits: int = 3) -> str:
    return "not measured" if value is None else f"{value:.{digits}f}"


def _plain(value: Any) -> str:
    """Text that is neither markup nor a break of a table, whatever a user named their model."""
    text = html.escape(" ".join(str(value).split()), quote=False)
    return "".join(f"\\{c}" if c in "\\`*_|[]" else c for c in text)
