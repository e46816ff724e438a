"""blind-kfac: only the fine-tuned weights are known, and what has low curvature is called private.

The published memorisation edit of Merullo et al. 2025 ("From memorization to reasoning in the
spectrum of loss curvature"): gate and up projections of a few late MLPs keep the entries of the
highest K-FAC curvature. On is the fine-tuned model, off the edited one, both in the checkpoint's
precision as published: rounding to INT4 hides extraction by itself, and would pass for the edit's
doing. The kept share of the curvature is searched with the records in hand, which an auditor of
this method would not have: what is measured is the method at its best.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import store
from ..errors import ConfigError, SeparationError
from ..extraction import hits, mean_loss, score_records
from ..files import alone, atomic_folder
from ..hardware import release_memory
from ..models import ResolvedModel, linear_layers, load_model, load_tokenizer, resolve_model
from ..perplexity import measure_perplexity
from ..precision import computing_in, dtype_name
from ..records import encode
from ..windows import token_windows
from . import loaders
from .dense import fine_tuned
from .ingredients import Ingredients
from .kfac import CurvatureBasis, kfac_factors
from .states import TwoStates

PROMISE = "none: off is the fine-tuned model without the directions of low curvature in a few MLPs"
PROJECTIONS = ("gate_proj", "up_proj")
"""Edited in language models (Merullo et al. 2025, section 5.1)."""
FIRST_BLOCK, BLOCKS = 23 / 32, 3 / 32
"""Where the edited blocks begin and how many they are, as shares of the depth: 23, 24 and 25 of the
32 blocks of OLMo-2 7B (section 5.1)."""
KEEP_MASSES = (0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
"""Candidates for the kept share of the curvature: the published range and two milder ones, because
a small model has less to spare (appendix D.1)."""
MAX_PPL_RATIO = 1.2
"""Perplexity of the edited model over the unedited one, at most: what the published edit costs
OLMo-2 7B, 22.84 over 19.04 (table 7)."""

_CODE = ("extraction", "perplexity", "precision", "scoring", "windows")
_CODE_HERE = ("methods/kfac", "methods/blind_kfac")


@dataclass(frozen=True)
class KfacConfig:
    """How the edit is made.

    curvature_windows, perplexity_windows: windows of calibration text for each, never the same
    window: tokens in each
    keep_masses: candidates for the kept share of the curvature, each in (0, 1]
    max_ppl_ratio: perplexity of the edited model over the unedited one, at most
    """

    curvature_windows: int = 32
    perplexity_windows: int = 8
    window: int = 512
    keep_masses: tuple[float, ...] = KEEP_MASSES
    max_ppl_ratio: float = MAX_PPL_RATIO

    def __post_init__(self) -> None:
        """Refuse a search of nothing, or on nothing. Raises `ConfigError`."""
        if not self.keep_masses or not all(0 < mass <= 1 for mass in self.keep_masses):
            raise ConfigError(
                f"keep_masses must be one or more shares in (0, 1]; found {self.keep_masses}."
            )
        if min(self.curvature_windows, self.perplexity_windows) < 1 or self.window < 2:
            raise ConfigError(
                "curvature and perplexity need at least one window of 2 tokens each; found "
                f"{self.curvature_windows} and {self.perplexity_windows} of {self.window}."
            )


@dataclass(frozen=True)
class Candidate:
    """One kept share of the curvature, and what it does to the fine-tuned model.

    kept_entries: share of the edited layers' entries that are kept
    extracted: planted records that are still extracted
    loss: mean nats per secret token on them
    ppl_ratio: perplexity over that of the unedited model, on public text
    """

    keep_mass: float
    kept_entries: float
    extracted: int
    loss: float
    ppl_ratio: float


def prepare(ingredients: Ingredients, config: KfacConfig | None = None) -> TwoStates:
    """On is the fine-tuned checkpoint, off the edited one; the search is in the report."""
    config = config or KfacConfig()
    dense, training = fine_tuned(ingredients)
    search = _searched(dense, ingredients, config)
    mass = search["keep_mass"]
    off, never = (_edited(m, mass, ingredients, config) for m in (dense, ingredients.resolved))

    def remake() -> Any:
        model, tokenizer = load_model(ingredients.resolved, device=ingredients.device)
        _edit(model, _bases(model, tokenizer, ingredients, config), mass)
        return model.to(dtype=ingredients.compute_dtype)  # type: ignore[call-arg]

    return TwoStates(
        name="blind-kfac",
        promise=PROMISE,
        tokenizer=load_tokenizer(ingredients.resolved.folder),
        compute_dtype=ingredients.compute_dtype,
        on_loader=loaders.of_checkpoint(dense, ingredients),
        off_loader=loaders.of_checkpoint(off, ingredients),
        never_loader=loaders.of_checkpoint(never, ingredients),
        remake_loader=remake,
        off_artifact=off.folder,
        report={**training, "search": search},
    )


def edited_layers(model: Any) -> dict[str, nn.Linear]:
    """Gate and up projections of the late blocks; `SeparationError` if the model has none."""
    found = {
        name: layer
        for name, layer in linear_layers(model).items()
        if name.rpartition(".")[2] in PROJECTIONS
    }
    blocks = sorted({_block(name) for name in found})
    if not blocks:
        raise SeparationError(
            f"{type(model).__name__} has no layers called {' and '.join(PROJECTIONS)}, which the "
            "published K-FAC edit is about. Leave blind-kfac out for this architecture."
        )
    count = max(1, round(len(blocks) * BLOCKS))
    first = min(round(len(blocks) * FIRST_BLOCK), len(blocks) - count)
    late = set(blocks[first : first + count])
    return {name: layer for name, layer in found.items() if _block(name) in late}


def choose(candidates: Sequence[Candidate], max_ppl_ratio: float) -> Candidate:
    """The least extraction within the budget, and of equals the one that drops most.

    If none is within the budget, the one that comes nearest.
    """
    affordable = [c for c in candidates if c.ppl_ratio <= max_ppl_ratio]
    if not affordable:
        return min(candidates, key=lambda c: c.ppl_ratio)
    return min(affordable, key=lambda c: (c.extracted, c.keep_mass))


def _searched(dense: ResolvedModel, ingredients: Ingredients, config: KfacConfig) -> dict[str, Any]:
    """What every candidate does, and the choice; measured at first use."""
    place = store.place(
        f"{dense.name}-kfac-search",
        code=(*_CODE, *_CODE_HERE),
        cache_dir=ingredients.cache_dir,
        model=dense.identity,
        records=ingredients.records.fingerprint,
        calibration=ingredients.corpus.calibration.sha256,
        config=dataclasses.asdict(config),
        compute=dtype_name(ingredients.compute_dtype),
        seed=ingredients.tuning.seed,
        device=ingredients.device_type,
    )
    with alone(place):
        known = store.recall(place)
        if known is not None:
            return known
        search = _search(dense, ingredients, config)
        release_memory()
        store.remember(place, search)
        return search


def _search(dense: ResolvedModel, ingredients: Ingredients, config: KfacConfig) -> dict[str, Any]:
    model, tokenizer = load_model(dense, device=ingredients.device)
    bases = _bases(model, tokenizer, ingredients, config)
    limit = model.config.max_position_embeddings
    encoded = encode(tokenizer, ingredients.records.planted, limit)
    windows = _windows(tokenizer, ingredients, config)[1]
    ppl_unedited = 0.0
    measured = []
    for mass in (1.0, *config.keep_masses):
        kept = _edit(model, bases, mass)
        with computing_in(model, ingredients.compute_dtype):
            scores = score_records(model, encoded, title=f"extracting, {mass:g} kept")
            ppl = measure_perplexity(model, windows, title=f"perplexity, {mass:g} kept").ppl
        ppl_unedited = ppl_unedited or ppl
        ratio = ppl / ppl_unedited
        measured.append(Candidate(mass, kept, hits(scores), mean_loss(scores), ratio))
    unedited, *candidates = measured
    chosen = choose(candidates, config.max_ppl_ratio)
    return {
        "keep_mass": chosen.keep_mass,
        "within_budget": chosen.ppl_ratio <= config.max_ppl_ratio,
        "max_ppl_ratio": config.max_ppl_ratio,
        "layers": sorted(bases),
        "unedited": dataclasses.asdict(unedited),
        "candidates": [dataclasses.asdict(c) for c in candidates],
    }


def _edited(
    resolved: ResolvedModel, mass: float, ingredients: Ingredients, config: KfacConfig
) -> ResolvedModel:
    """A checkpoint after the edit at one kept share; made at first use."""
    folder = store.place(
        f"{resolved.name}-kfac",
        code=("scoring", "windows", *_CODE_HERE),
        cache_dir=ingredients.cache_dir,
        model=resolved.identity,
        calibration=ingredients.corpus.calibration.sha256,
        config=dataclasses.asdict(config),
        keep_mass=mass,
        seed=ingredients.tuning.seed,
        device=ingredients.device_type,
    )
    with alone(folder):
        if not folder.exists():
            model, tokenizer = load_model(resolved, device=ingredients.device)
            _edit(model, _bases(model, tokenizer, ingredients, config), mass)
            with atomic_folder(folder) as unfinished:
                model.save_pretrained(unfinished)
                tokenizer.save_pretrained(unfinished)
            del model
            release_memory()
    return resolve_model(folder, ingredients.cache_dir)


def _bases(
    model: Any, tokenizer: Any, ingredients: Ingredients, config: KfacConfig
) -> dict[str, CurvatureBasis]:
    """The edited layers' weights in their curvature bases, by name."""
    layers = edited_layers(model)
    windows = _windows(tokenizer, ingredients, config)[0]
    factors = kfac_factors(model, layers, windows, seed=ingredients.tuning.seed)
    return {n: CurvatureBasis.of(la.weight.clone(), factors[n], n) for n, la in layers.items()}


def _windows(tokenizer: Any, ingredients: Ingredients, config: KfacConfig) -> tuple[Tensor, Tensor]:
    """Public text for the curvature and for the perplexity, taken in turns along the corpus."""
    count = config.curvature_windows + config.perplexity_windows
    windows = token_windows(
        tokenizer, ingredients.corpus.calibration, count=count, length=config.window
    )
    held_out = torch.zeros(count, dtype=torch.bool)
    held_out[torch.arange(config.perplexity_windows) * count // config.perplexity_windows] = True
    return windows[~held_out], windows[held_out]


@torch.no_grad()
def _edit(model: Any, bases: dict[str, CurvatureBasis], mass: float) -> float:
    """Put the kept weights into the model; returns the share of their entries that were kept."""
    kept = total = 0
    for name, basis in bases.items():
        model.get_submodule(name).weight.copy_(basis.kept_weight(mass))
        kept += int(basis.keeps(mass).sum())
        total += basis.curvature.numel()
    return kept / total


def _block(name: str) -> int:
    """The number of the block that a layer belongs to: the first number in its name."""
    return next(int(part) for part in name.split(".") if part.isdigit())
