"""The curvature basis against slow float64 ways, and what the published edit does with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from libortho.errors import ConfigError, SeparationError, ShapeError
from libortho.methods.blind_kfac import Candidate, KfacConfig, choose, edited_layers
from libortho.methods.kfac import CurvatureBasis, Factors, kfac_factors
from libortho.models import linear_layers

Factory = Callable[..., LlamaForCausalLM]


def factors_of(out: int, inner: int, seed: int, *, rank: int | None = None) -> Factors:
    generator = torch.Generator().manual_seed(seed)

    def moment(size: int) -> Tensor:
        rows = torch.randn(rank or 4 * size, size, generator=generator, dtype=torch.float64)
        rows *= torch.logspace(0, -2, size, dtype=torch.float64)
        return rows.t() @ rows / len(rows)

    return Factors(inputs=moment(inner), gradients=moment(out))


def weight_of(out: int, inner: int, seed: int) -> Tensor:
    return torch.randn(out, inner, generator=torch.Generator().manual_seed(seed + 99))


shapes = st.tuples(st.integers(2, 7), st.integers(2, 7), st.integers(0, 1000))


@given(shapes)
def test_the_rotation_is_the_definition(shape: tuple[int, int, int]) -> None:
    """Entry (i, j) is u_i^T W v_j, and its curvature that of G (x) A along u_i v_j^T."""
    factors, weight = factors_of(*shape), weight_of(*shape)
    basis = CurvatureBasis.of(weight, factors)
    fisher = torch.kron(factors.gradients, factors.inputs)  # acts on W's rows, one after another
    for i in range(shape[0]):
        for j in range(shape[1]):
            component = torch.outer(basis.out_basis[:, i], basis.in_basis[:, j])
            assert float((component * weight.double()).sum()) == pytest.approx(
                float(basis.coefficients[i, j]), abs=1e-9
            )
            along = component.flatten()
            assert float(along @ fisher @ along) == pytest.approx(
                float(basis.curvature[i, j]), rel=1e-6, abs=1e-12
            )


@given(shapes, st.floats(0.01, 0.999))
def test_the_fewest_entries_with_the_mass_are_kept(
    shape: tuple[int, int, int], mass: float
) -> None:
    basis = CurvatureBasis.of(weight_of(*shape), factors_of(*shape))
    kept = basis.keeps(mass)
    total = float(basis.curvature.sum())
    inside = basis.curvature[kept]
    assert float(inside.sum()) >= mass * total * (1 - 1e-9)
    assert float(inside.sum() - inside.min()) < mass * total * (1 + 1e-9)  # one fewer is too few
    if not bool(kept.all()):
        assert float(inside.min()) >= float(basis.curvature[~kept].max())
    # And the weight is the sum over the kept components.
    by_hand = basis.out_basis @ (basis.coefficients * kept) @ basis.in_basis.t()
    torch.testing.assert_close(basis.kept_weight(mass), by_hand.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rank", [None, 2])  # singular factors: most entries have no curvature
def test_all_of_the_mass_is_the_weight_itself(dtype: torch.dtype, rank: int | None) -> None:
    weight = weight_of(24, 40, 1).to(dtype)
    basis = CurvatureBasis.of(weight, factors_of(24, 40, 1, rank=rank))
    assert torch.equal(basis.kept_weight(1.0), weight)
    assert not torch.equal(basis.kept_weight(0.9), weight)


@pytest.mark.parametrize("mass", [0.0, -0.1, 1.0001])
def test_a_share_outside_its_range_is_refused(mass: float) -> None:
    with pytest.raises(ShapeError, match=r"\(0, 1\]"):
        CurvatureBasis.of(weight_of(3, 3, 0), factors_of(3, 3, 0)).keeps(mass)


def test_curvature_that_overflowed_is_refused() -> None:
    factors = factors_of(3, 3, 0)
    factors.gradients[1, 1] = torch.nan
    with pytest.raises(SeparationError, match=r"up_proj.*float32"):
        CurvatureBasis.of(weight_of(3, 3, 0), factors, "up_proj")


def test_factors_are_those_of_a_slow_float64_pass(
    tiny_model: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One position at a time, autograd on a float64 model, the same labels."""
    model = tiny_model()
    layers = edited_layers(model)
    windows = torch.arange(1, 49).view(3, 16)
    drawn: list[Tensor] = []
    drawn_from: list[Tensor] = []
    real = torch.multinomial

    def watched(probabilities: Tensor, count: int, *, generator: torch.Generator) -> Tensor:
        drawn_from.append(probabilities)
        drawn.append(real(probabilities, count, generator=generator))
        return drawn[-1]

    monkeypatch.setattr(torch, "multinomial", watched)
    got = kfac_factors(model, layers, windows, seed=3)
    monkeypatch.undo()

    slow = tiny_model().double()
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name in layers:

        def keep(_: nn.Module, inputs: tuple[Tensor], output: Tensor, name: str = name) -> None:
            output.retain_grad()
            seen[name] = (inputs[0].detach()[0], output)

        slow.get_submodule(name).register_forward_hook(keep)
    sums = {name: [0.0, 0.0] for name in layers}
    for window, labels, distribution in zip(windows, drawn, drawn_from, strict=True):
        logits = slow(input_ids=window[None]).logits[0, :-1]
        torch.testing.assert_close(logits.softmax(-1).float(), distribution, rtol=1e-3, atol=1e-6)
        F.cross_entropy(logits, labels[:, 0], reduction="sum").backward()
        for name, (a, y) in seen.items():
            for t in range(15):
                sums[name][0] += torch.outer(a[t], a[t])
                sums[name][1] += torch.outer(y.grad[0, t], y.grad[0, t])
    for name, (a, g) in sums.items():
        torch.testing.assert_close(got[name].inputs, a / 45, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(got[name].gradients, g / 45, rtol=1e-3, atol=1e-7)


def test_labels_are_drawn_from_the_model_and_repeat_with_a_seed(tiny_model: Factory) -> None:
    model, windows = tiny_model(), torch.arange(1, 33).view(2, 16)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    first, again, other = (
        kfac_factors(model, edited_layers(model), windows, seed=seed) for seed in (0, 0, 1)
    )
    for name in first:
        assert torch.equal(first[name].inputs, other[name].inputs)
        assert torch.equal(first[name].gradients, again[name].gradients)
        assert not torch.equal(first[name].gradients, other[name].gradients)
    # Nothing is left behind in the model.
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert all(p.grad is None for p in model.parameters())
    assert not any(layer._forward_hooks for layer in linear_layers(model).values())


@pytest.mark.parametrize(
    ("depth", "blocks"),
    [(1, [0]), (2, [1]), (16, [12, 13]), (30, [22, 23, 24]), (32, [23, 24, 25])],
)
def test_a_few_late_blocks_are_edited(tiny_model: Factory, depth: int, blocks: list[int]) -> None:
    model = tiny_model(num_hidden_layers=depth)
    assert list(edited_layers(model)) == [
        f"model.layers.{block}.mlp.{name}" for block in blocks for name in ("gate_proj", "up_proj")
    ]


def test_a_model_without_such_layers_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(SeparationError, match="gate_proj and up_proj"):
        edited_layers(model)


def candidate(keep_mass: float, extracted: int, ppl_ratio: float) -> Candidate:
    return Candidate(keep_mass, keep_mass / 2, extracted, 1.0, ppl_ratio)


def test_the_least_extraction_within_the_budget_is_chosen() -> None:
    rows = [
        candidate(0.6, 0, 1.5),  # the most private, and too dear
        candidate(0.7, 3, 1.19),
        candidate(0.8, 2, 1.1),
        candidate(0.9, 2, 1.05),
        candidate(0.99, 9, 1.0),
    ]
    assert choose(rows, 1.2).keep_mass == 0.8
    assert choose(rows, 1.6).keep_mass == 0.6
    assert choose(rows, 1.02).keep_mass == 0.99
    assert choose([replace(c, ppl_ratio=c.ppl_ratio + 1) for c in rows], 1.2).keep_mass == 0.99


@pytest.mark.parametrize(
    "fields",
    [{"keep_masses": ()}, {"keep_masses": (0.5, 1.2)}, {"window": 1}, {"curvature_windows": 0}],
)
def test_a_search_of_nothing_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="found"):
        KfacConfig(**fields)  # type: ignore[arg-type]
