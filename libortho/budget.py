"""The arithmetic of memory: how many bytes a model takes at a precision, part by part.

Knows the registry's geometries and the storage formats. Doesn't know machines or profiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .config import NO_LATTICE, SeparationConfig, TuningConfig
from .errors import ConfigError
from .hardware import MIB
from .lattice import groups_per_row
from .registry import ModelEntry
from .stream import BITS_PER_ENTRY

Precision = Literal["fp16", "int8", "nf4", "int4"]

PRECISION_OF_BITS: dict[int, Precision] = {16: "fp16", 8: "int8", 4: "int4"}
"""What `--quantization-bits` means for the linear weights."""
LATTICE_BITS_PER_GROUP = 32
"""A float16 scale and a float16 zero point."""
NF4_BLOCK = 64
NF4_BITS_PER_BLOCK = 32
"""One float32 absmax a block, without double quantisation (Dettmers et al. 2023, section 3)."""
CUBLAS_WORKSPACE_CONFIG = ":4096:2:16:8"
"""2 x 4 MiB + 8 x 16 KiB, on every card; the default of compute capability 9.0 is 32 MiB."""
_CUBLAS_WORKSPACE_BYTES = 2 * 4096 * 1024 + 8 * 16 * 1024


@dataclass(frozen=True)
class Budget:
    """Where a model's memory goes.

    weights_mib: linear layers with their scales and zero points, and the norms
    embedding_mib: embedding and output head
    streams_mib: residual and private stream
    kv_cache_mib: keys and values of one sequence, 16 bits each
    workspace_mib: what a forward pass over one sequence needs for a moment
    """

    weights_mib: float
    embedding_mib: float
    streams_mib: float
    kv_cache_mib: float
    workspace_mib: float

    @property
    def total_mib(self) -> float:
        return (
            self.weights_mib
            + self.embedding_mib
            + self.streams_mib
            + self.kv_cache_mib
            + self.workspace_mib
        )


def stream_bytes(entry: ModelEntry, density: float) -> float:
    """Bytes of a sparse stream at a density; rounding entries per row moves it by some percent."""
    return entry.linear_parameters * density * BITS_PER_ENTRY / 8


def linear_bytes(
    entry: ModelEntry,
    bits: int,
    group_size: int,
    density_residual: float = 0.0,
    density_private: float = 0.0,
) -> float:
    """Bytes of all separated layers: lattice (none at 16 bits), scales, zero points, streams."""
    groups = 0
    if bits != NO_LATTICE:
        groups = sum(rows * groups_per_row(cols, group_size) for rows, cols in _matrices(entry))
    dense = entry.linear_parameters * bits / 8 + groups * LATTICE_BITS_PER_GROUP / 8
    return dense + stream_bytes(entry, density_residual) + stream_bytes(entry, density_private)


def kv_cache_bytes(entry: ModelEntry, sequence_length: int) -> int:
    """Bytes of the keys and values of one sequence at 16 bits each."""
    return 2 * 2 * entry.num_layers * entry.num_kv_heads * entry.head_dim * sequence_length


def workspace_bytes(entry: ModelEntry, bits: int, sequence_length: int) -> int:
    """Bytes that a forward pass over one sequence needs on top, an estimate from above.

    Logits of all positions in 16 bits and in float32 (for the loss), activations of one block, the
    largest matrix unpacked to float32 and to 16 bits (where it is packed), and cuBLAS's workspace.
    """
    logits = sequence_length * entry.vocab_size * (2 + 4)
    block = sequence_length * (4 * entry.hidden_size + 3 * entry.intermediate_size) * 2
    unpacked = 0 if bits == NO_LATTICE else entry.hidden_size * entry.intermediate_size * (4 + 2)
    return logits + block + unpacked + _CUBLAS_WORKSPACE_BYTES


def model_bytes(
    entry: ModelEntry,
    precision: Precision,
    *,
    group_size: int = SeparationConfig.group_size,
    density_residual: float = 0.0,
    density_private: float = 0.0,
    sequence_length: int = 0,
    embedding_bits: int = 16,
) -> Budget:
    """The memory of a model with its linear weights at a precision, norms at 16 bits.

    With `sequence_length` 0 it is the model alone, without KV cache and workspace.
    """
    if precision == "nf4":
        bits = 4
        per_weight = bits + NF4_BITS_PER_BLOCK / NF4_BLOCK
        linear = entry.linear_parameters * per_weight / 8
    else:
        bits = {"fp16": NO_LATTICE, "int8": 8, "int4": 4}[precision]
        linear = linear_bytes(entry, bits, group_size)
    norms = entry.parameters - entry.linear_parameters - entry.embedding_parameters
    streams = stream_bytes(entry, density_residual) + stream_bytes(entry, density_private)
    workspace = workspace_bytes(entry, bits, sequence_length) if sequence_length else 0
    return Budget(
        weights_mib=(linear + norms * 2) / MIB,
        embedding_mib=entry.embedding_parameters * embedding_bits / 8 / MIB,
        streams_mib=streams / MIB,
        kv_cache_mib=kv_cache_bytes(entry, sequence_length) / MIB,
        workspace_mib=workspace / MIB,
    )


def decode_bytes_per_token(entry: ModelEntry, budget: Budget) -> float:
    """Bytes read to decode one token: everything but the workspace and the embedding's table.

    Of an untied embedding one row is read, of the head all of them; a tied matrix is the head.
    """
    head = budget.embedding_mib if entry.tied_embeddings else budget.embedding_mib / 2
    return (budget.weights_mib + head + budget.streams_mib + budget.kv_cache_mib) * MIB


def run_budget(
    entry: ModelEntry, bits: int, sequence_length: int = 512, embedding_bits: int = 16
) -> Budget:
    """The memory of a separated and tuned model with the default densities and group size."""
    if bits not in PRECISION_OF_BITS:
        raise ConfigError(f"Quantization bits must be 4, 8 or 16; found {bits}.")
    return model_bytes(
        entry,
        PRECISION_OF_BITS[bits],
        # Unquantised weights have no error for a residual to correct.
        density_residual=0.0 if bits == NO_LATTICE else SeparationConfig.residual_density,
        density_private=TuningConfig.density,
        sequence_length=sequence_length,
        embedding_bits=embedding_bits,
    )


def _matrices(entry: ModelEntry) -> list[tuple[int, int]]:
    """(out, in) of every separated matrix: q, k, v, o, gate, up and down of each block."""
    hidden, inner = entry.hidden_size, entry.intermediate_size
    query = entry.num_attention_heads * entry.head_dim
    key_value = entry.num_kv_heads * entry.head_dim
    block = [(query, hidden), (key_value, hidden), (key_value, hidden), (hidden, query)]
    block += [(inner, hidden), (inner, hidden), (hidden, inner)]
    return block * entry.num_layers
