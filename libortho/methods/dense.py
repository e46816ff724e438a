"""Dense fine-tuning: what people do who don't separate. The ingredient of B1 and the blind methods.

Knows a plain model, records and public text: the weights of all linear layers are trained, with
the same batches, replay and end as the private stream is. Embedding, head and norms stay.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from .. import store
from ..config import TrainingConfig
from ..errors import HardwareError, RecordError
from ..files import alone, atomic_folder
from ..hardware import MIB, free_bytes, release_memory
from ..models import ResolvedModel, linear_layers, load_model, resolve_model
from ..precision import dtype_name, evaluating
from ..records import Record, encode
from ..training import Trainer, TrainingReport, replay_windows
from .ingredients import Ingredients

_CODE = ("precision", "scoring", "training", "windows", "methods/dense")
_TRAINED_BYTES = 4 * 4
"""Of a trained weight: itself, its gradient and Adam's two moments, in float32 each."""


def fine_tune(
    model: Any,
    tokenizer: Any,
    records: Sequence[Record],
    *,
    replay: Sequence[str],
    config: TrainingConfig,
    compute_dtype: torch.dtype = torch.float32,
) -> TrainingReport:
    """Train the linear weights of a plain float32 model on records, in place.

    records: what the model shall know
    replay: public documents on which it shall go on predicting what it does now
    compute_dtype: bfloat16 runs the products in it, over float32 weights; anything else is float32,
        because float16's gradients underflow

    Takes 16 bytes a linear weight. Raises `RecordError` for no records or ones that exceed the
    context, `HardwareError` if memory doesn't suffice; after an interruption the weights are
    half-trained and of no use.
    """
    if not records:
        raise RecordError("there are no records to fine-tune on; pass at least one.")
    encoded = encode(tokenizer, records, model.config.max_position_embeddings)
    windows = replay_windows(tokenizer, replay, config, config.steps)
    weights = [layer.weight for layer in linear_layers(model).values()]
    _check_memory(model, sum(weight.numel() for weight in weights))
    began = time.perf_counter()
    before = [(p, p.requires_grad) for p in model.parameters()]
    half = compute_dtype == torch.bfloat16
    try:
        model.requires_grad_(False)
        # Without its cache autocast would multiply with the weights of the step before.
        products = torch.autocast(
            model.device.type, torch.bfloat16, enabled=half, cache_enabled=False
        )
        with evaluating(model), products:
            trainer = Trainer(model, encoded, windows, config, began)
            for weight in weights:
                weight.requires_grad_(True)
            trainer.optimise(weights, steps=config.steps, lr=config.lr, title="fine-tuning")
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)
            parameter.grad = None
    return trainer.report(torch.bfloat16 if half else torch.float32)


def fine_tuned(ingredients: Ingredients) -> tuple[ResolvedModel, dict[str, Any]]:
    """The public model fine-tuned on the planted records, and the report; trained at first use.

    It is kept as a plain checkpoint in the public one's dtype, as its owner would hand it out.
    """
    resolved = ingredients.resolved
    config = TrainingConfig(**ingredients.equal_budget(ingredients.dense_lr))
    folder = store.place(
        f"{resolved.name}-dense",
        code=_CODE,
        cache_dir=ingredients.cache_dir,
        model=resolved.identity,
        records=ingredients.records.fingerprint,
        replay=ingredients.corpus.replay.sha256,
        config=config.to_dict(),
        compute=dtype_name(ingredients.compute_dtype),
        device=ingredients.device_type,
    )
    with alone(folder):
        report = store.recall(folder)
        if not folder.exists() or report is None:
            model, tokenizer = load_model(resolved, dtype=torch.float32, device=ingredients.device)
            report = fine_tune(
                model,
                tokenizer,
                ingredients.records.repeated,
                replay=ingredients.corpus.replay,
                config=config,
                compute_dtype=ingredients.compute_dtype,
            ).to_dict()
            store.remember(folder, report)
            with atomic_folder(folder) as unfinished:
                stored: Any = model.to(dtype=resolved.dtype_on_disk)  # type: ignore[call-arg]
                stored.save_pretrained(unfinished)
                tokenizer.save_pretrained(unfinished)
            del model
            release_memory()
    return resolve_model(folder, ingredients.cache_dir), report


def _check_memory(model: Any, trained: int) -> None:
    """Refuse before the first step what would fail in it."""
    free = free_bytes(model.device)
    # The weights themselves are in memory already.
    needed = trained * (_TRAINED_BYTES - 4)
    if needed > free:
        raise HardwareError(
            f"dense fine-tuning needs {needed / MIB:,.0f} MiB more for the gradients and Adam's "
            f"moments of {trained:,} weights, and {free / MIB:,.0f} MiB are free on "
            f"{model.device}. Audit ortho and qlora, which train a hundredth of that, or use a "
            "smaller model."
        )
