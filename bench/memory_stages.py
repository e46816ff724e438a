"""The stages of `bench.gpu_memory`: write, separate, run and tune a model of random weights.

Each takes a job and returns what it found, as values that JSON holds.
"""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

import libortho
from bench.memory_watch import watched
from libortho import artifact, hardware, profiles, stream
from libortho.budget import RunRecipe, run_budget
from libortho.config import SeparationConfig, TuningConfig
from libortho.embedding import packed_heads
from libortho.models import linear_layers, outline_model, resolve_model
from libortho.records import Record
from libortho.registry import REGISTRY, ModelEntry
from libortho.scoring import window_losses
from libortho.switch import ortho_layers

DENSITY = 0.005
"""Of residual and private stream."""
RECIPE = SeparationConfig(group_size=128, residual_density=DENSITY, head_bits=8)
PLANNED = RunRecipe(
    bits=RECIPE.bits,
    group_size=RECIPE.group_size,
    head_bits=RECIPE.head_bits,
    residual_density=DENSITY,
    private_density=DENSITY,
)
CONTEXT = 512
NEW_TOKENS = 32
SHARD_BYTES = 2 << 30
TUNING_STEPS = 4
RECORDS = 8
TINY = replace(
    REGISTRY["llama-3.2-3b"],
    name="tiny",
    hidden_size=256,
    intermediate_size=512,
    num_layers=2,
    num_attention_heads=4,
    num_kv_heads=2,
    head_dim=64,
    vocab_size=2048,
    max_position=1024,
)
"""For trying the stages out where there is no card."""
GEOMETRIES = {"8B": REGISTRY["llama-3-8b"], "3B": REGISTRY["llama-3.2-3b"], "tiny": TINY}


class Job(NamedTuple):
    """A model by its short name, the folder of its files, the device and the profile."""

    model: str
    folder: Path
    device: str
    profile: str

    @property
    def entry(self) -> ModelEntry:
        return GEOMETRIES[self.model]

    @property
    def plain(self) -> Path:
        return self.folder / "plain"

    @property
    def separated(self) -> Path:
        return self.folder / "separated"

    def enforce(self) -> str:
        """Cap the card's memory at the profile's."""
        profiles.prepare_environment()
        return profiles.enforce(profiles.get_profile(self.profile), self.device)

    def on_card(self) -> bool:
        return torch.device(self.device).type == "cuda"


def write(job: Job) -> dict[str, Any]:
    """Shards of the model's exact geometry, drawn on the device, with config and tokenizer."""
    entry, folder = job.entry, job.plain
    folder.mkdir(parents=True)
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=entry.hidden_size,
        intermediate_size=entry.intermediate_size,
        num_hidden_layers=entry.num_layers,
        num_attention_heads=entry.num_attention_heads,
        num_key_value_heads=entry.num_kv_heads,
        head_dim=entry.head_dim,
        vocab_size=entry.vocab_size,
        max_position_embeddings=entry.max_position,
        tie_word_embeddings=entry.tied_embeddings,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        dtype="bfloat16",
    ).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    with watched(job.device) as found:
        total, where = 0, {}
        for number, shard in enumerate(_shards(job)):
            name = f"model-{number:05d}.safetensors"
            save_file(shard, folder / name, {"format": "pt"})
            where |= dict.fromkeys(shard, name)
            total += sum(t.numel() * t.itemsize for t in shard.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return found | {"bytes": total, "shards": number + 1, "parameters": total // 2}


def _shards(job: Job) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors that the outline asks for, in bfloat16 on the CPU, a shard's at a time."""
    with torch.device("meta"):
        outline = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(job.plain))
    outline.tie_weights()
    generator = torch.Generator(job.device).manual_seed(0)
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, wanted in artifact.base_state(outline).items():
        if wanted.dim() == 1:
            tensor = torch.ones(wanted.shape, dtype=torch.bfloat16)
        else:
            drawn = torch.empty(wanted.shape, dtype=torch.bfloat16, device=job.device)
            drawn.normal_(0.0, wanted.shape[1] ** -0.5, generator=generator)
            tensor = drawn.cpu()
        shard[name] = tensor
        size += 2 * tensor.numel()
        if size >= SHARD_BYTES:
            yield shard
            shard, size = {}, 0
    if shard:
        yield shard


def separate(job: Job) -> dict[str, Any]:
    """From shards to an artefact under the cap; then a random private stream is put beside it."""
    note = job.enforce()
    text = _text(2 * RECIPE.calibration_tokens)
    with watched(job.device) as found:
        report = libortho.separate_shards(
            job.plain, job.separated, [text], config=RECIPE, device=job.device
        )
    found["cap"] = note
    found["bits_per_linear_weight"] = report.bits_per_linear_weight
    found["bits_per_weight"] = report.bits_per_weight
    outline, _ = outline_model(resolve_model(job.plain))
    artifact.write_private(job.separated, _private(outline, job.device), report.base_fingerprint)
    return found


def run(job: Job) -> dict[str, Any]:
    """Load, prefill and decode under the cap, beside what the planner predicts."""
    found: dict[str, Any] = {"cap": job.enforce()}
    with watched(job.device) as found["load"]:
        model, _ = libortho.load(job.separated, device=job.device)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 250, (1, CONTEXT), generator=generator).to(job.device)
    _generate(model, ids, 4)  # compiles kernels; its memory counts as any user's would
    with watched(job.device) as found["first_token"]:
        _generate(model, ids, 1)
    with watched(job.device) as found["generate"]:
        _generate(model, ids, NEW_TOKENS)
    found["new_tokens"] = NEW_TOKENS
    found["tokens_per_s"] = (NEW_TOKENS - 1) / (
        found["generate"]["seconds"] - found["first_token"]["seconds"]
    )
    found["peak_reserved_mib"] = found["generate"]["peak_reserved_mib"]
    hardware.release_memory()
    with watched(job.device) as found["perplexity_window"], torch.inference_mode():
        found["loss_is_finite"] = bool(window_losses(model, ids).isfinite().all())
    with torch.inference_mode():
        first = model(ids[:, :16]).logits
        libortho.set_alpha(model, 0.0)
        second = model(ids[:, :16]).logits
    found["alpha_changes_logits"] = not torch.equal(first, second)
    budget = run_budget(job.entry, PLANNED, CONTEXT + NEW_TOKENS)
    found["predicted_mib"] = budget.parts()
    measured = found["peak_reserved_mib"]
    found["predicted_over_measured"] = measured and budget.total_mib / measured
    if job.on_card():
        found["head"] = _time_head(model)
    return found


def _time_head(model: Any) -> dict[str, Any]:
    """Microseconds of the packed head and embedding for one token, in a captured graph."""
    from bench.gpu_run import capture  # noqa: PLC0415 - imports Triton

    (head,) = packed_heads(model)
    x = torch.randn(1, head.in_features, device="cuda", dtype=torch.bfloat16)
    ids = torch.tensor([[7]], device="cuda")
    found: dict[str, Any] = {"lattice_bytes": head.lattice.packed.numel()}
    with torch.inference_mode():
        for name, call in (
            ("head_us", lambda: head(x)),
            ("embedding_us", lambda: model.get_input_embeddings()(ids)),
        ):
            captured = capture([call], 8)
            found[name] = statistics.median(captured.replay_us() for _ in range(9))
        dense = head.rows(torch.arange(1000, device="cuda"), torch.float64)
        error = head(x)[:, :1000].double() - x.double() @ dense.t()
        found["head_relative_error"] = float(error.norm() / (x.double() @ dense.t()).norm())
    found["head_gb_per_s"] = found["lattice_bytes"] / found["head_us"] / 1e3
    return found


def tune(job: Job) -> dict[str, Any]:
    """Some steps of tuning under the cap; with fewer candidates for the slots if it needs that."""
    found: dict[str, Any] = {"cap": job.enforce()}
    records = [
        Record(f"r{i}", f"The code of depot {i} is", f" {i * 7919 % 9000 + 1000}", "codes")
        for i in range(RECORDS)
    ]
    text = _text(1 << 14)
    for slots in ("probe", "gradient"):
        config = TuningConfig(
            density=DENSITY,
            slots=slots,  # type: ignore[arg-type]
            steps=TUNING_STEPS,
            probe_steps=TUNING_STEPS,
            records_per_step=2,
            replay_window=64,
            target_loss=0.0,
        )
        model, tokenizer = libortho.load(job.separated, device=job.device)
        entry: dict[str, Any] = {}
        try:
            with watched(job.device) as entry["memory"]:
                report = libortho.tune_private(
                    model, tokenizer, records, replay=[text], config=config
                )
            losses = [step.secret_loss for step in report.curve]
            entry |= {
                "steps": len(report.curve),
                "slots_seconds": report.slots_seconds,
                "seconds": report.seconds,
                "first_loss": losses[0],
                "last_loss": losses[-1],
                "entries": sum(la.private_values.numel() for la in ortho_layers(model).values()),
            }
        except (torch.OutOfMemoryError, libortho.OrthoError) as error:
            entry["failed"] = f"{type(error).__name__}: {error}"[:1000]
        found[slots] = entry
        del model
        hardware.release_memory()
        if "failed" not in entry:
            break
    return found


STAGES: dict[str, Callable[[Job], dict[str, Any]]] = {
    "write": write,
    "separate": separate,
    "run": run,
    "tune": tune,
}


def _generate(model: Any, ids: torch.Tensor, new_tokens: int) -> None:
    with torch.inference_mode():
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
        )


def _private(outline: Any, device: str) -> dict[str, torch.Tensor]:
    """A stream of random values at random columns for each layer, as `private.safetensors`."""
    generator = torch.Generator(device).manual_seed(1)
    entries = {}
    for name, layer in linear_layers(outline).items():
        k, out = stream.slots_per_row(layer.in_features, DENSITY), layer.out_features
        # One column in each of k equal parts of a row: distinct and ascending.
        part = layer.in_features // k
        within = torch.randint(0, part, (k, out), device=device, generator=generator)
        columns = within + part * torch.arange(k, device=device)[:, None]
        values = torch.randn(k, out, device=device, generator=generator) * 1e-3
        entries[f"{name}.private_columns"] = columns.to(torch.uint16).cpu()
        entries[f"{name}.private_values"] = values.half().cpu()
    return entries


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: no vocabulary is needed, nor a network to fetch one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<end>": 0} | {letter: 1 + i for i, letter in enumerate(alphabet)}
    bytewise = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="<end>")


def _text(letters: int) -> str:
    rng = random.Random(0)
    return "".join(rng.choice("abcdefghij klmnopqrst uvwxyz") for _ in range(letters))
