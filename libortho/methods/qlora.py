"""QLoRA as two states: a low-rank adapter of peft on a base that bitsandbytes quantised to NF4.

Knows peft and bitsandbytes, as their users run them (Dettmers et al. 2023). On is base + adapter;
off is the base that the adapter was trained on, once the adapter is taken out. peft is imported
where it is needed, because that takes seconds and most runs don't need it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import store
from ..config import TrainingConfig
from ..errors import RecordError
from ..files import alone, atomic_folder
from ..hardware import release_memory
from ..models import load_tokenizer
from ..peers import load_peer, quiet_peer
from ..precision import dtype_name
from ..records import Record, encode
from ..training import Trainer, TrainingReport, replay_windows
from .ingredients import Ingredients
from .states import TwoStates, running

if TYPE_CHECKING:
    from peft import PeftModel

PROMISE = "off has the same bytes as the model that never saw the records; there is no residual"
_CODE = ("peers", "precision", "scoring", "training", "windows", "methods/qlora")


@dataclass(frozen=True)
class QloraConfig(TrainingConfig):
    """How the adapter is trained; further fields are `TrainingConfig`'s.

    rank: of each layer's update
    lora_alpha: over the rank, what the update is multiplied by
    """

    rank: int = 8
    lora_alpha: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_counts("rank", "lora_alpha")


def attach(model: Any, config: QloraConfig) -> PeftModel:
    """A new adapter on every linear layer but the head, which changes nothing until it is trained.

    `model` itself is changed, and stays the transformers model that is run.
    """
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415

    recipe = LoraConfig(
        r=config.rank,
        lora_alpha=config.lora_alpha,
        target_modules="all-linear",
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        return get_peft_model(model, recipe)


def train_adapter(
    adapted: PeftModel,
    tokenizer: Any,
    records: Sequence[Record],
    *,
    replay: Sequence[str],
    config: QloraConfig,
    compute_dtype: torch.dtype,
) -> TrainingReport:
    """Train an adapter that is still new on records; the base is frozen.

    Raises `RecordError` for no records or ones that exceed the context.
    """
    if not records:
        raise RecordError("there are no records to train an adapter on; pass at least one.")
    model: Any = adapted.get_base_model()
    encoded = encode(tokenizer, records, model.config.max_position_embeddings)
    windows = replay_windows(tokenizer, replay, config, config.steps)
    began = time.perf_counter()
    values = [p for p in adapted.parameters() if p.requires_grad]
    with running(model, compute_dtype):
        trainer = Trainer(model, encoded, windows, config, began)
        trainer.optimise(values, steps=config.steps, lr=config.lr, title="training an adapter")
    return trainer.report(compute_dtype)


def prepare(ingredients: Ingredients) -> TwoStates:
    """An NF4 base from the public model, and an adapter trained on the planted records."""
    folder, report = _adapter(ingredients)

    def base() -> Any:
        return load_peer(
            ingredients.resolved,
            "nf4",
            dtype=ingredients.compute_dtype,
            device=ingredients.device,
        )

    def adapted() -> PeftModel:
        from peft import PeftModel  # noqa: PLC0415

        return PeftModel.from_pretrained(base(), str(folder))

    def on() -> Any:
        return adapted().get_base_model()

    def off() -> Any:
        # The base comes out from under the adapter: had it been changed there, it would show.
        return adapted().unload()

    return TwoStates(
        name="qlora",
        promise=PROMISE,
        promises_equality=True,
        tokenizer=load_tokenizer(ingredients.resolved.folder),
        compute_dtype=ingredients.compute_dtype,
        on_loader=on,
        off_loader=off,
        never_loader=base,
        remake_loader=base,
        dial=_scaled,
        report=report,
    )


def _adapter(ingredients: Ingredients) -> tuple[Path, dict[str, Any]]:
    resolved = ingredients.resolved
    config = QloraConfig(**ingredients.equal_budget(ingredients.adapter_lr))
    folder = store.place(
        f"{resolved.name}-qlora",
        code=_CODE,
        libraries=("peft", "bitsandbytes"),
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
            with quiet_peer():
                model = load_peer(
                    resolved, "nf4", dtype=ingredients.compute_dtype, device=ingredients.device
                )
                adapted = attach(model, config)
                report = train_adapter(
                    adapted,
                    load_tokenizer(resolved.folder),
                    ingredients.records.repeated,
                    replay=ingredients.corpus.replay,
                    config=config,
                    compute_dtype=ingredients.compute_dtype,
                ).to_dict()
                store.remember(folder, report)
                with atomic_folder(folder) as unfinished:
                    adapted.save_pretrained(str(unfinished), safe_serialization=True)
            del model, adapted
            release_memory()
    return folder, report


@contextmanager
def _scaled(model: Any, alpha: float) -> Iterator[Any]:
    """Run a block with the adapter's update multiplied by alpha."""
    from peft.helpers import rescale_adapter_scale  # noqa: PLC0415

    with rescale_adapter_scale(model, alpha):
        yield model
