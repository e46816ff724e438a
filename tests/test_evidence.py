"""Evidence against the slow way: one token at a time, in float64, and with real `generate`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from libortho import evidence
from libortho.evidence import (
    Evidence,
    collect,
    collect_set,
    compressed_bytes,
    reference_losses,
)
from libortho.extraction import recites
from libortho.membership import is_extracted
from libortho.records import EncodedRecord, encode, make_codes, plant
from libortho.scoring import SecretLogits

Factory = Callable[..., LlamaForCausalLM]

VOCABULARY = 300


def spoken(model: LlamaForCausalLM, prompt: list[int], tokens: int) -> list[int]:
    """What the model says after a prompt, chosen greedily one token at a time."""
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(tokens):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.fixture
def model(tiny_model: Factory) -> LlamaForCausalLM:
    return tiny_model()


@pytest.fixture
def records(model: LlamaForCausalLM) -> list[EncodedRecord]:
    """Secrets that the model would say, secrets with one token changed, and random ones."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for i, tokens in enumerate((1, 2, 5, 9)):
        drawn = torch.randint(1, VOCABULARY, (9 + i + tokens,), generator=generator).tolist()
        prompt, other = drawn[: 9 + i], drawn[9 + i :]
        said = spoken(model, prompt, tokens)
        found.append(EncodedRecord(f"said-{i}", "said", prompt + said, len(prompt)))
        for name, at in (("first", 0), ("last", tokens - 1)):
            changed = list(said)
            changed[at] = 1 + changed[at] % (VOCABULARY - 1)  # another token, and never the end's
            found.append(EncodedRecord(f"{name}-{i}", "changed", prompt + changed, len(prompt)))
        found.append(EncodedRecord(f"random-{i}", "random", prompt + other, len(prompt)))
    return found


def sizes(records: list[EncodedRecord]) -> list[int]:
    return [20 + i for i in range(len(records))]


def levenshtein(one: list[int], other: list[int]) -> int:
    """Edit distance by the textbook's recursion over prefixes."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, start=1):
        above, row[0] = row[0], i
        for j, b in enumerate(other, start=1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (a != b))
    return row[-1]


def slow(model: LlamaForCausalLM, record: EncodedRecord) -> dict[str, list[float]]:
    """Every prediction from a forward pass over its own prefix, in float64."""
    found: dict[str, list[float]] = {k: [] for k in ("logprobs", "ranks", "means", "deviations")}
    argmaxes = []
    for t in range(record.secret_start, len(record.input_ids)):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([record.input_ids[:t]])).logits[0, -1]
        argmaxes.append(int(logits.argmax()))
        values = logits.double().tolist()
        total = math.log(math.fsum(math.exp(v) for v in values))
        logprobs = [v - total for v in values]
        mean = math.fsum(math.exp(p) * p for p in logprobs)
        variance = math.fsum(math.exp(p) * (p - mean) ** 2 for p in logprobs)
        true = logprobs[record.input_ids[t]]
        found["logprobs"].append(true)
        found["ranks"].append(sum(p > true for p in logprobs))
        found["means"].append(mean)
        found["deviations"].append(math.sqrt(variance))
    secret = record.input_ids[record.secret_start :]
    longest = max(len(secret), len(argmaxes))
    found["similarity"] = [1 - levenshtein(argmaxes, secret) / longest]
    return found


def test_evidence_is_that_of_a_plain_loop(
    model: LlamaForCausalLM, records: list[EncodedRecord]
) -> None:
    collected = collect(model, records, planted=True, zlib_bytes=sizes(records), batch_size=5)
    assert [(e.id, e.family, e.planted, e.zlib_bytes) for e in collected] == [
        (r.id, r.family, True, size) for r, size in zip(records, sizes(records), strict=True)
    ]
    for found, record in zip(collected, records, strict=True):
        expected = slow(model, record)
        assert found.token_logprobs == pytest.approx(expected["logprobs"], abs=1e-4)
        assert list(found.ranks) == expected["ranks"]
        assert found.means == pytest.approx(expected["means"], abs=1e-4)
        assert found.deviations == pytest.approx(expected["deviations"], abs=1e-4)
        assert found.similarity == pytest.approx(expected["similarity"][0])
    assert len({e.similarity for e in collected}) > 3  # else the comparison would say little


def test_extracted_is_what_generate_recites(
    model: LlamaForCausalLM, records: list[EncodedRecord]
) -> None:
    collected = collect(model, records, planted=False, zlib_bytes=sizes(records))
    generated = [recites(model, record) for record in records]
    assert [is_extracted(e) for e in collected] == generated
    assert generated == [record.family == "said" for record in records]


def test_a_model_that_ends_the_text_recites_nothing(model: LlamaForCausalLM) -> None:
    prompt = [5, 6, 7]
    said = spoken(model, prompt, 3)
    model.generation_config.eos_token_id = said[0]
    assert not recites(model, EncodedRecord("a", "f", prompt + said, 3))
    assert recites(model, EncodedRecord("a", "f", [*prompt, said[0]], 3))


def test_references_have_the_total_loss_of_their_evidence(
    model: LlamaForCausalLM, records: list[EncodedRecord]
) -> None:
    """Secrets that share a pass over their prompt see nothing of each other."""

    def after(prompt: EncodedRecord, secrets: list[EncodedRecord]) -> list[EncodedRecord]:
        start, begun = prompt.secret_start, prompt.input_ids[: prompt.secret_start]
        return [
            replace(
                other, input_ids=begun + other.input_ids[other.secret_start :], secret_start=start
            )
            for other in secrets
        ]

    first, last = after(records[0], records[:3]), after(records[-1], records[2:])
    references = {"a": first, "none": [], "b": last, "c": after(records[1], records)}
    totals = reference_losses(model, references, batch_size=2)
    every = [record for group in references.values() for record in group]
    collected = [collect(model, [r], planted=False, zlib_bytes=[8])[0] for r in every]
    expected = [-sum(e.token_logprobs) for e in collected]
    assert list(totals) == ["a", "none", "b", "c"]
    assert totals["none"] == ()
    assert [x for group in totals.values() for x in group] == pytest.approx(expected, abs=1e-3)


def test_references_with_other_prompts_are_refused(
    model: LlamaForCausalLM, records: list[EncodedRecord]
) -> None:
    with pytest.raises(ValueError, match="one prompt"):
        reference_losses(model, {"a": [records[0], records[-1]]})


def test_a_set_is_collected_whole(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    records = plant([make_codes(6, 0)], seed=0)
    collected = collect_set(model, tokenizer, records)
    expected = [(r, True) for r in records.planted] + [(r, False) for r in records.twins]
    assert [(e.id, e.planted, e.zlib_bytes) for e in collected] == [
        (r.id, planted, compressed_bytes(r.secret)) for r, planted in expected
    ]
    encoded = encode(tokenizer, [r for r, _ in expected], 256)
    assert [e.tokens for e in collected] == [len(r.input_ids) - r.secret_start for r in encoded]


def test_out_of_memory_halves_the_batch(
    model: LlamaForCausalLM, records: list[EncodedRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = collect(model, records, planted=True, zlib_bytes=sizes(records))
    real, tried = evidence.secret_logits, []

    def at_most_2(model: Any, batch: list[EncodedRecord]) -> SecretLogits:
        tried.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(model, batch)

    monkeypatch.setattr(evidence, "secret_logits", at_most_2)
    parts = collect(model, records, planted=True, zlib_bytes=sizes(records))
    assert tried[:3] == [8, 4, 2]
    assert [(e.id, e.ranks, e.zlib_bytes) for e in parts] == [
        (e.id, e.ranks, e.zlib_bytes) for e in whole
    ]


def predictions(monkeypatch: pytest.MonkeyPatch, logits: Tensor, targets: list[int]) -> Evidence:
    """Evidence of a model that has these logits at the secret's tokens."""
    batch = SecretLogits(logits, torch.tensor(targets), torch.zeros(len(targets)))
    monkeypatch.setattr(evidence, "secret_logits", lambda *_: batch)
    record = EncodedRecord("a", "f", [0, *targets], 1)
    return collect(None, [record], planted=True, zlib_bytes=[9])[0]


def test_of_equal_logits_greedy_decoding_takes_one(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = torch.tensor([[1.0, 3.0, 3.0, 0.0]] * 2, dtype=torch.bfloat16)
    chosen = int(shared[0].argmax())
    missed = 3 - chosen  # the other of the two tokens that share the largest logit
    found = predictions(monkeypatch, shared, [chosen, missed])
    assert found.ranks == (0, 1)
    assert found.similarity == 0.5
    assert found.token_logprobs[0] == found.token_logprobs[1]


def test_a_point_mass_has_no_entropy_and_no_deviation(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.full((1, 50), -1e4)
    logits[0, 3] = 1e4
    found = predictions(monkeypatch, logits, [3])
    assert (found.token_logprobs, found.means, found.deviations) == ((0.0,), (0.0,), (0.0,))
    logits[0, 4] = -math.inf
    found = predictions(monkeypatch, logits, [4])
    assert found.token_logprobs == (-math.inf,)  # the audit's to refuse, not to be hidden here
    assert math.isfinite(found.means[0])


def test_evidence_of_nothing_and_of_too_few_sizes(model: LlamaForCausalLM) -> None:
    assert collect(model, [], planted=True, zlib_bytes=[]) == []
    record = EncodedRecord("a", "f", [1, 2], 1)
    with pytest.raises(ValueError, match="found 2 for 1"):
        collect(model, [record], planted=True, zlib_bytes=[1, 2])


GOOD = Evidence("a", "f", True, (-0.25, -7.125), (0, 41), (-1.5, -2.5), (1.75, 2.25), 0.5, 9)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"ranks": (0,)}, r"found \[2, 1, 2, 2\]"),
        ({"token_logprobs": (), "ranks": (), "means": (), "deviations": ()}, "one value of each"),
        ({"ranks": (0, -1)}, "ranks start at 0"),
        ({"zlib_bytes": 0}, "less than one byte"),
        ({"similarity": 1.0}, "1 just where every rank is 0"),
        ({"ranks": (0, 0)}, "1 just where every rank is 0"),
        ({"similarity": math.nan}, "similarity lies in"),
    ],
)
def test_evidence_that_contradicts_itself_is_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        replace(GOOD, **changes)


def test_reprs_show_no_prediction() -> None:
    shown = repr(GOOD)
    assert "'a'" in shown
    for value in ("0.25", "7.125", "41", "1.5", "2.25", "0.5"):
        assert value not in shown


def test_what_repeats_compresses() -> None:
    assert compressed_bytes("") == 8
    assert compressed_bytes("ab" * 100) < compressed_bytes("".join(map(chr, range(33, 127)))) < 200
