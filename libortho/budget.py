"""The arithmetic of memory: how many bytes a model takes at a precision, part by part.

Knows the registry's geometries, the storage formats, and what the code holds for a moment: each
part has a function of its own, so that a measurement that disagrees can be laid at one. Doesn't
know machines or profiles.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Literal

from .config import NO_LATTICE, SeparationConfig, TuningConfig
from .errors import ConfigError
from .hardware import MIB
from .kernels.op import PART_ELEMENTS
from .lattice import groups_per_row
from .registry import ModelEntry
from .scoring import positions_at_once
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
_TRAINED_BYTES = 2 + 4 + 4 + 8
"""An entry of a stream in training: column, float32 value, gradient, Adam's moments."""


ALLOCATOR_SHARE = 0.01
"""Of everything that lasts, what torch's allocator adds by blocks that it can't reuse. On an H100
it reserved 28 MiB more than the 4,977 that Llama 3 8B had allocated at its peak, and 32 more than
the 2,062 of Llama 3.2 3B (`bench/results/h100-memory.json`)."""


@dataclass(frozen=True)
class RunRecipe:
    """What decides how much memory a separated and tuned model takes.

    bits, group_size, head_bits, residual_density: as in `SeparationConfig`
    private_density: as `TuningConfig.density`
    """

    bits: int = SeparationConfig.bits
    group_size: int = SeparationConfig.group_size
    head_bits: int = SeparationConfig.head_bits
    residual_density: float = SeparationConfig.residual_density
    private_density: float = TuningConfig.density

    @property
    def words(self) -> str:
        """For a sentence."""
        if self.bits == NO_LATTICE:
            return f"16-bit weights, a private stream of {self.private_density:.1%}"
        return (
            f"{self.bits} bits in groups of {self.group_size}, embedding and head at "
            f"{self.head_bits} bits, a private stream of {self.private_density:.1%}"
        )


def recipes(bits: int) -> tuple[RunRecipe, ...]:
    """What can be run at so many bits, from the defaults to what takes least.

    The head goes to 8 bits first, which costs the least quality for its size, then groups get
    larger and the private stream smaller. Raises `ConfigError` for bits other than 4, 8 and 16.
    """
    if bits not in PRECISION_OF_BITS:
        raise ConfigError(f"Quantization bits must be 4, 8 or 16; found {bits}.")
    if bits == NO_LATTICE:  # unquantised weights have no error for a residual to correct
        return (RunRecipe(bits, residual_density=0.0),)
    default = RunRecipe(bits)
    packed = replace(default, head_bits=8)
    return default, packed, replace(packed, group_size=128, private_density=0.005)


@dataclass(frozen=True)
class Budget:
    """Where a model's memory goes.

    weights_mib: linear layers with their scales and zero points, and the norms
    embedding_mib: embedding and output head
    streams_mib: residual and private stream
    kv_cache_mib: keys and values of all sequences, 16 bits each
    workspace_mib: what a forward pass over the sequences needs for a moment
    overhead_mib: cuBLAS's workspace and what the allocator rounds up; not the CUDA context
    """

    weights_mib: float
    embedding_mib: float
    streams_mib: float
    kv_cache_mib: float
    workspace_mib: float
    overhead_mib: float = 0.0

    @property
    def total_mib(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))

    def parts(self) -> dict[str, float]:
        """Every part by name, and `total_mib`."""
        return asdict(self) | {"total_mib": self.total_mib}


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


def embedding_bytes(entry: ModelEntry, head_bits: int) -> float:
    """Bytes of embedding and head; at 8 bits each row has a scale and a zero point."""
    rows = entry.embedding_parameters // entry.hidden_size
    scales = 0 if head_bits == NO_LATTICE else rows * LATTICE_BITS_PER_GROUP / 8
    return entry.embedding_parameters * head_bits / 8 + scales


def activation_bytes(entry: ModelEntry, tokens: int) -> int:
    """Bytes of one block's activations at 16 bits: the residual stream, its norm, and the MLP's."""
    return tokens * (4 * entry.hidden_size + 3 * entry.intermediate_size) * 2


def composed_bytes(entry: ModelEntry, bits: int) -> int:
    """Bytes of the largest matrix, or part of one, composed to 16 bits for a prompt."""
    largest = entry.hidden_size * entry.intermediate_size
    return 0 if bits == NO_LATTICE else min(PART_ELEMENTS, largest) * 2


def logits_bytes(entry: ModelEntry, tokens: int, head_bits: int) -> int:
    """Bytes of the logits that are scored at once, in 16 bits, in float32 and as their logarithms.

    And of the part of a packed head that is dense meanwhile.
    """
    head = entry.vocab_size * entry.hidden_size
    part = 0 if head_bits == NO_LATTICE else min(PART_ELEMENTS, head) * 2
    return positions_at_once(tokens, entry.vocab_size) * entry.vocab_size * (2 + 4 + 4) + part


def workspace_bytes(entry: ModelEntry, bits: int, tokens: int, head_bits: int = NO_LATTICE) -> int:
    """Bytes that a forward pass over so many tokens needs on top, an estimate from above.

    A block's activations beside its largest matrix, or the logits: one follows the other.
    """
    block = activation_bytes(entry, tokens) + composed_bytes(entry, bits)
    return max(block, logits_bytes(entry, tokens, head_bits))


def model_bytes(
    entry: ModelEntry,
    precision: Precision,
    *,
    group_size: int = SeparationConfig.group_size,
    density_residual: float = 0.0,
    density_private: float = 0.0,
    sequence_length: int = 0,
    batch_size: int = 1,
    embedding_bits: int = NO_LATTICE,
) -> Budget:
    """The memory of a model with its linear weights at a precision, norms at 16 bits.

    With `sequence_length` 0 it is the model alone: no KV cache, workspace and overhead.
    """
    if precision == "nf4":
        bits = 4
        per_weight = bits + NF4_BITS_PER_BLOCK / NF4_BLOCK
        linear = entry.linear_parameters * per_weight / 8
    else:
        bits = {"fp16": NO_LATTICE, "int8": 8, "int4": 4}[precision]
        linear = linear_bytes(entry, bits, group_size)
    norms = entry.parameters - entry.linear_parameters - entry.embedding_parameters
    weights = linear + norms * 2
    embedding = embedding_bytes(entry, embedding_bits)
    streams = stream_bytes(entry, density_residual) + stream_bytes(entry, density_private)
    cache = batch_size * kv_cache_bytes(entry, sequence_length)
    workspace, overhead = 0.0, 0.0
    if sequence_length:
        tokens = batch_size * sequence_length
        workspace = workspace_bytes(entry, bits, tokens, embedding_bits)
        lasting = weights + embedding + streams + cache
        overhead = _CUBLAS_WORKSPACE_BYTES + ALLOCATOR_SHARE * lasting
    return Budget(
        *(part / MIB for part in (weights, embedding, streams, cache, workspace, overhead))
    )


def decode_bytes_per_token(entry: ModelEntry, budget: Budget) -> float:
    """Bytes read to decode one token: everything but the workspace and the embedding's table.

    Of an untied embedding one row is read, of the head all of them; a tied matrix is the head.
    """
    head = budget.embedding_mib if entry.tied_embeddings else budget.embedding_mib / 2
    return (budget.weights_mib + head + budget.streams_mib + budget.kv_cache_mib) * MIB


def run_budget(
    entry: ModelEntry, recipe: RunRecipe, sequence_length: int = 512, batch_size: int = 1
) -> Budget:
    """The memory of a separated and tuned model that runs sequences of that length."""
    return model_bytes(
        entry,
        PRECISION_OF_BITS[recipe.bits],
        group_size=recipe.group_size,
        density_residual=recipe.residual_density,
        density_private=recipe.private_density,
        sequence_length=sequence_length,
        batch_size=batch_size,
        embedding_bits=recipe.head_bits,
    )


def tuning_floor_mib(entry: ModelEntry, recipe: RunRecipe) -> float:
    """MiB below which a private stream can't be tuned: what is frozen, and what is trained.

    An entry that is trained takes a column, a float32 master, its gradient and Adam's two moments.
    Activations come on top, and a probe trains `tuning.CANDIDATES` times as many entries.
    """
    frozen = run_budget(entry, replace(recipe, private_density=0.0))
    trained = entry.linear_parameters * recipe.private_density * _TRAINED_BYTES
    return frozen.weights_mib + frozen.embedding_mib + frozen.streams_mib + trained / MIB


def _matrices(entry: ModelEntry) -> list[tuple[int, int]]:
    """(out, in) of every separated matrix: q, k, v, o, gate, up and down of each block."""
    hidden, inner = entry.hidden_size, entry.intermediate_size
    query = entry.num_attention_heads * entry.head_dim
    key_value = entry.num_kv_heads * entry.head_dim
    block = [(query, hidden), (key_value, hidden), (key_value, hidden), (hidden, query)]
    block += [(inner, hidden), (inner, hidden), (hidden, inner)]
    return block * entry.num_layers
