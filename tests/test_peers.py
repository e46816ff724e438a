"""The bitsandbytes peers on a CPU: loaded as their users load them, and counted honestly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from libortho import peers
from libortho.errors import HardwareError
from libortho.models import ResolvedModel, resolve_model
from libortho.peers import PEER_OF_BITS, Peer, bits_per_peer_weight, load_peer, quiet_peer


@pytest.fixture
def resolved(
    tiny_model: Callable[..., LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> ResolvedModel:
    """A tiny model on disk whose widths bitsandbytes can pack in blocks of 64."""
    folder = tmp_path / "tiny"
    tiny_model(hidden_size=256, intermediate_size=512).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return resolve_model(folder, tmp_path / "cache")


# NF4: 4 bits, an 8-bit scale for 64 weights, and codebooks, which weigh more in a tiny layer than
# in a real one. LLM.int8: 8 bits and a float32 scale a row.
@pytest.mark.parametrize(("peer", "low", "high"), [("nf4", 4.1, 4.6), ("int8", 8.0, 8.2)])
def test_a_peer_runs_and_its_bits_are_counted(
    peer: Peer, low: float, high: float, resolved: ResolvedModel
) -> None:
    with quiet_peer():
        model = load_peer(resolved, peer, dtype=torch.float32, device="cpu")
        with torch.inference_mode():
            logits = model(input_ids=torch.arange(1, 20)[None]).logits
    assert not model.training
    assert bool(torch.isfinite(logits).all())
    assert low < bits_per_peer_weight(model) < high


def test_every_lattice_has_its_peers() -> None:
    assert PEER_OF_BITS == {4: ("nf4",), 8: ("int8",), 16: ()}


def test_without_bitsandbytes_the_remedy_is_named(
    resolved: ResolvedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    with pytest.raises(HardwareError, match="pip install bitsandbytes"):
        load_peer(resolved, "nf4", dtype=torch.float32, device="cpu")


def test_a_refusal_of_bitsandbytes_is_one_paragraph(
    resolved: ResolvedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA Setup failed\ndespite GPU being available")

    monkeypatch.setattr(peers.AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(HardwareError, match=r"nf4 .* on cpu.*CUDA Setup") as caught:
        load_peer(resolved, "nf4", dtype=torch.float32, device="cpu")
    assert "\n" not in str(caught.value)


def test_out_of_memory_passes_through(
    resolved: ResolvedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(peers.AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(torch.OutOfMemoryError):
        load_peer(resolved, "int8", dtype=torch.float32, device="cpu")
