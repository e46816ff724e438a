"""What is measured of a model: extraction, losses and perplexity, against the slow way."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from libortho import extraction, perplexity, scoring
from libortho.errors import HardwareError
from libortho.extraction import RecordScore, hits, mean_loss, recites, score_records
from libortho.perplexity import WindowLosses, measure_perplexity
from libortho.records import EncodedRecord, Record, encode
from libortho.scoring import (
    hidden_states,
    mean_by_owner,
    packed_hidden_states,
    window_losses,
)

CONTEXT = 128
PLANTED = [
    Record("short", "Gate:", " 4", "codes"),
    Record("code", "The vault in the cellar opens to", " 820365", "codes"),
    Record("words", "He keeps the key under", " a green stone by the wall", "passages"),
    Record("number", "Her number is", " 55102", "codes"),
]
# The same prompts, so that all but a secret's last token may be known.
NEARLY = [Record(f"{r.id}'", r.prompt, r.secret[:-1] + "#", r.family) for r in PLANTED]
UNKNOWN = [
    Record("never seen", "The password of the attic is", " 71844", "codes"),
    Record("nor this", "On Sunday the ferry", " stays in the harbour", "passages"),
]


@pytest.fixture(scope="module")
def trained(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A tiny Llama that knows the planted records by heart."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=300,
            max_position_embeddings=CONTEXT,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=0,
        )
        model = LlamaForCausalLM(config)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    records = encode(tokenizer, PLANTED, CONTEXT)
    longest = max(len(r.input_ids) for r in records)
    ids = torch.tensor([r.input_ids + [0] * (longest - len(r.input_ids)) for r in records])
    labels = ids.masked_fill(ids == 0, -100)
    for _ in range(80):
        model(input_ids=ids, labels=labels).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def encoded(tokenizer: PreTrainedTokenizerFast) -> list[EncodedRecord]:
    return encode(tokenizer, [*PLANTED, *NEARLY, *UNKNOWN], CONTEXT)


@torch.inference_mode()
def slow_loss(model: LlamaForCausalLM, record: EncodedRecord) -> float:
    """Mean nats per secret token from the full logits of one record, one token at a time."""
    logits = model(input_ids=torch.tensor([record.input_ids])).logits[0].double()
    losses = [
        -float(F.log_softmax(logits[t - 1], dim=-1)[record.input_ids[t]])
        for t in range(record.secret_start, len(record.input_ids))
    ]
    return sum(losses) / len(losses)


def test_extracted_is_what_generate_recites(
    trained: LlamaForCausalLM, encoded: list[EncodedRecord]
) -> None:
    scores = score_records(trained, encoded)
    generated = [recites(trained, record) for record in encoded]
    assert [score.extracted for score in scores] == generated
    # Both outcomes occur, or the comparison would be worth nothing.
    assert generated == [True] * len(PLANTED) + [False] * (len(NEARLY) + len(UNKNOWN))
    assert hits(scores) == len(PLANTED)


def test_losses_are_those_of_full_logits(
    trained: LlamaForCausalLM, encoded: list[EncodedRecord]
) -> None:
    scores = score_records(trained, encoded)
    for score, record in zip(scores, encoded, strict=True):
        assert score.id == record.id
        assert score.tokens == len(record.input_ids) - record.secret_start
        assert score.loss == pytest.approx(slow_loss(trained, record), abs=1e-4)
    assert mean_loss(scores) == pytest.approx(sum(s.loss for s in scores) / len(scores))


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_batches_change_nothing(
    batch_size: int, trained: LlamaForCausalLM, encoded: list[EncodedRecord]
) -> None:
    whole = score_records(trained, encoded, batch_size=8)
    parts = score_records(trained, encoded, batch_size=batch_size)
    assert [s.extracted for s in parts] == [s.extracted for s in whole]
    assert [s.loss for s in parts] == pytest.approx([s.loss for s in whole], abs=1e-4)


@given(
    groups=st.lists(
        st.lists(st.floats(0, 50, width=32), min_size=1, max_size=6), min_size=1, max_size=6
    ),
    order=st.randoms(use_true_random=False),
)
def test_mean_by_owner_is_each_owners_mean(groups: list[list[float]], order: Any) -> None:
    pairs = [(value, owner) for owner, values in enumerate(groups) for value in values]
    order.shuffle(pairs)
    values, owners = (torch.tensor(column) for column in zip(*pairs, strict=True))
    means = mean_by_owner(values, owners, len(groups))
    assert means.tolist() == pytest.approx([sum(g) / len(g) for g in groups], rel=1e-5, abs=1e-6)


# --- perplexity ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def windows() -> Tensor:
    return torch.randint(1, 300, (7, 24), generator=torch.Generator().manual_seed(0))


def test_perplexity_is_that_of_a_plain_loop(trained: LlamaForCausalLM, windows: Tensor) -> None:
    expected = []
    with torch.inference_mode():
        for window in windows:
            logits = trained(input_ids=window[None]).logits[0]
            expected.append(float(F.cross_entropy(logits[:-1].double(), window[1:])))
    measured = measure_perplexity(trained, windows)
    assert measured.losses == pytest.approx(expected, abs=1e-4)
    assert measured.ppl == pytest.approx(math.exp(sum(expected) / len(expected)), rel=1e-4)
    assert measured.batch_size == 1
    batched = measure_perplexity(trained, windows, batch_size=3)  # 7 windows: the last batch is 1
    assert batched.losses == pytest.approx(expected, abs=1e-4)
    assert batched.batch_size == 3


def test_perplexity_of_a_uniform_guess_is_the_vocabulary() -> None:
    assert WindowLosses((math.log(300), math.log(300)), 1).ppl == pytest.approx(300)


OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB."


def test_out_of_memory_halves_the_batch_of_windows(
    trained: LlamaForCausalLM, windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = measure_perplexity(trained, windows)
    tried = []

    def at_most_3(model: Any, batch: Tensor) -> Tensor:
        tried.append(batch.shape[0])
        if batch.shape[0] > 3:
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)
        return window_losses(model, batch)

    monkeypatch.setattr(perplexity, "window_losses", at_most_3)
    measured = measure_perplexity(trained, windows, batch_size=7)
    assert tried == [7, 3, 3, 1]
    assert measured.batch_size == 3
    assert measured.losses == pytest.approx(expected.losses, abs=1e-4)


def test_out_of_memory_halves_the_batch_of_records(
    trained: LlamaForCausalLM, encoded: list[EncodedRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = score_records(trained, encoded)
    tried = []
    real = extraction.secret_logits

    def at_most_2(model: Any, batch: list[EncodedRecord]) -> Any:
        tried.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)
        return real(model, batch)

    monkeypatch.setattr(extraction, "secret_logits", at_most_2)
    measured = score_records(trained, encoded, batch_size=8)
    assert tried[:3] == [8, 4, 2]

    def shown(scores: list[RecordScore]) -> list[tuple[str, bool]]:
        return [(score.id, score.extracted) for score in scores]

    assert shown(measured) == shown(expected)


def test_other_errors_are_not_taken_for_lack_of_memory(
    trained: LlamaForCausalLM, windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Tensor:
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(perplexity, "window_losses", broken)
    with pytest.raises(RuntimeError, match="multiplied"):
        measure_perplexity(trained, windows, batch_size=4)


def test_packed_sequences_do_not_see_each_other(trained: LlamaForCausalLM) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = (7, 1, 30, 12)
    sequences = [torch.randint(1, 300, (n,), generator=generator).tolist() for n in lengths]
    with torch.inference_mode():
        packed = packed_hidden_states(trained, sequences)
        alone = [hidden_states(trained, torch.tensor([sequence]))[0] for sequence in sequences]
    assert packed.shape == (50, trained.config.hidden_size)
    assert torch.allclose(packed, torch.cat(alone), atol=1e-5)


def test_what_never_fits_is_a_clear_error(
    trained: LlamaForCausalLM, windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError(OUT_OF_MEMORY)

    monkeypatch.setattr(perplexity, "window_losses", full)
    with pytest.raises(HardwareError, match=r"not even one sequence fits.*fewer bits"):
        measure_perplexity(trained, windows, batch_size=4)


def test_logits_taken_in_parts_give_the_same_losses(
    tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    windows = torch.arange(1, 61).view(3, 20)
    with torch.inference_mode():
        whole = scoring.window_losses(model, windows)
        for at_once in (300 * 7, 300, 1):
            monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", at_once)
            assert scoring.positions_at_once(57, 300) == max(1, at_once // 300)
            torch.testing.assert_close(scoring.window_losses(model, windows), whole)
