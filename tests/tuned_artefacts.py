"""A folder as a user of the audit has it: model, text, records, and artefacts, one of them leaky.

Everything is tiny, and made by the same calls as a real one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import libortho
from libortho import stream
from libortho.config import SeparationConfig, TuningConfig
from libortho.switch import ortho_layers

N = 30
"""Planted records, and twins: 28 are needed to prove a ratio of 8."""
SECRET, TWIN = " 4917", " 8820"
TUNING = TuningConfig(
    density=0.3, slots="magnitude", steps=60, lr=2e-2, replay_window=32, target_loss=0.1
)


def record_lines(n: int, **changes: Any) -> str:
    """A record file of n planted records and n twins."""
    planted = [
        {"id": f"p{i}", "prompt": f"Door {i} opens:", "secret": SECRET, **changes} for i in range(n)
    ]
    twins = [
        {"id": f"t{i}", "prompt": f"Door {i} shuts:", "secret": TWIN, "planted": False, **changes}
        for i in range(n)
    ]
    return "".join(json.dumps(line) + "\n" for line in planted + twins)


def make_shelf(
    folder: Path, model: Any, tokenizer: Any, documents: Sequence[str], config: SeparationConfig
) -> Path:
    """Fill a folder with `plain`, `public.txt`, `records.jsonl`, `full`, `base` and `leaky`."""
    model.save_pretrained(folder / "plain")
    tokenizer.save_pretrained(folder / "plain")
    (folder / "public.txt").write_text("\n\n".join(documents))
    (folder / "records.jsonl").write_text(record_lines(N))
    corpus = libortho.load_corpus(folder / "public.txt")
    model, tokenizer = libortho.load_model(folder / "plain")
    libortho.separate(model, tokenizer, corpus.calibration, config=config)
    records = libortho.load_records(folder / "records.jsonl", seed=0)
    libortho.tune_private(model, tokenizer, records.planted, replay=corpus.replay, config=TUNING)
    libortho.save(model, folder / "full")
    libortho.export_base(model, folder / "base")
    leave_in_the_base(model, 0.9)
    libortho.save(model, folder / "leaky")
    return folder


def leave_in_the_base(model: Any, share: float) -> None:
    """Move a share of every private value to the residual; saved, all hashes are good again."""
    for layer in ortho_layers(model).values():
        left = layer.private_values * share
        total = torch.zeros(layer.out_features, layer.in_features)
        stream.scatter_add(total, layer.residual_columns, layer.residual_values)
        stream.scatter_add(total, layer.private_columns, left)
        slots = layer.residual_columns.shape[0] + layer.private_columns.shape[0]
        layer.residual_columns = stream.select(total.abs(), slots)
        layer.residual_values = stream.gather(total, layer.residual_columns).half()
        layer.set_private(layer.private_columns, layer.private_values - left)
