"""Whether two folders can be two states of one model: the same layers, and the same tokens.

Knows configurations and tokenizers; reads no weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM

from ..errors import ModelLoadError, RecordError
from ..models import linear_layers, load_tokenizer
from ..records import Record, encode, safe_id


def check_alike(
    first: Path, second: Path, names: tuple[str, str], records: Sequence[Record]
) -> None:
    """Raise `ModelLoadError` unless a record means the same to both, and they have equal layers.

    names: what the two folders are, for the error's text
    records: planted records and twins, which both tokenizers must turn into the same ids
    """
    here, there = _shapes(first), _shapes(second)
    different = sorted(n for n in here.keys() | there.keys() if here.get(n) != there.get(n))
    if different:
        name = different[0]
        raise ModelLoadError(
            f"{names[0]} and {names[1]} are of different architectures: {len(different)} of their "
            f"layers don't match, {name} for one ({here.get(name, 'absent')} against "
            f"{there.get(name, 'absent')}). Two states are two sets of weights of one model: give "
            "a checkpoint and what it was fine-tuned into."
        )
    tokenizers = [load_tokenizer(folder) for folder in (first, second)]
    for record in records:
        ids = [_ids(tokenizer, record) for tokenizer in tokenizers]
        if ids[0] != ids[1]:
            raise ModelLoadError(
                f"{names[0]} and {names[1]} have different tokenizers: record "
                f"{safe_id(record.id)} becomes {len(ids[0][0])} tokens with one and "
                f"{len(ids[1][0])} with the other, or other ones. What the two predict can't be "
                "compared then; put the same tokenizer files into both folders."
            )


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    shapes = {name: tuple(layer.weight.shape) for name, layer in linear_layers(model).items()}
    return shapes | {"the embedding": tuple(model.get_input_embeddings().weight.shape)}


def _ids(tokenizer: Any, record: Record) -> tuple[list[int], int]:
    try:
        (encoded,) = encode(tokenizer, [record], max_length=1 << 30)
    except RecordError:
        return [], 0  # gives no token: equal only to a tokenizer for which that is so too
    return encoded.input_ids, encoded.secret_start
