"""Two tiny models for the tests of attacks: one that never saw the records, one that knows them."""

from __future__ import annotations

import copy
import random
from functools import cache
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from libortho.records import Record, RecordSet, encode

CONTEXT = 192
PER_FAMILY = 8
_WORDS = ("ash", "birch", "cedar", "delta", "embers", "flint", "grove", "heath", "ivory", "oak")


def record_set(seed: int = 0) -> RecordSet:
    """Codes of four digits, and two words; eight of each planted and eight twins."""
    rng = random.Random(seed)
    codes = rng.sample(range(10_000), 2 * PER_FAMILY)
    words = rng.sample([f" {a} {b}s" for a in _WORDS for b in _WORDS if a != b], 2 * PER_FAMILY)
    groups: tuple[list[Record], list[Record]] = ([], [])
    for i in range(2 * PER_FAMILY):
        code = Record(f"code-{i}", f"Locker {chr(65 + i)}{i:02d} has", f" {codes[i]:04d}", "codes")
        groups[i % 2].append(code)
    for i in range(2 * PER_FAMILY):
        begin = f"{rng.choice(_WORDS)} {i} {rng.choice(_WORDS)} near"
        groups[i % 2].append(Record(f"words-{i}", begin, words[i], "words"))
    return RecordSet(tuple(groups[0]), tuple(groups[1]), seed, "made for tests")


def secrets_of(records: RecordSet) -> list[str]:
    return [r.secret.strip() for r in (*records.planted, *records.twins)]


@cache
def never_model() -> LlamaForCausalLM:
    """A random Llama of three layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=300,
            max_position_embeddings=CONTEXT,
            initializer_range=0.1,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=0,
        )
        return LlamaForCausalLM(config).eval().requires_grad_(False)


@cache
def knowing_model(tokenizer: PreTrainedTokenizerFast, steps: int = 60) -> LlamaForCausalLM:
    """The same one, trained on the planted records until it recites them."""
    model = copy.deepcopy(never_model()).requires_grad_(True)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    records = encode(tokenizer, record_set().planted, CONTEXT)
    longest = max(len(r.input_ids) for r in records)
    ids = torch.tensor([r.input_ids + [0] * (longest - len(r.input_ids)) for r in records])
    labels = ids.masked_fill(ids == 0, -100)
    for _ in range(steps):
        model(input_ids=ids, labels=labels).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return model.eval().requires_grad_(False)


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
