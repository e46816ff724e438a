"""K-FAC: the curvature of the loss in a layer's weights, and what is left of them without its tail.

Knows models, token windows and matrices. For a linear layer with inputs a and output gradients g
the Fisher information is approximated by G (x) A, with A = E[a a^T] and G = E[g g^T] over tokens
(Martens and Grosse 2015, equation 1). In the eigenbases G = U_G diag(l) U_G^T and
A = U_A diag(m) U_A^T a weight W is C = U_G^T W U_A, and the entry (i, j) of C has the curvature
l_i * m_j. Merullo et al. 2025 ("From memorization to reasoning in the spectrum of loss curvature",
section 5) keep the entries of the highest curvature and set the others to zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import SeparationError, ShapeError
from ..precision import evaluating
from ..scoring import hidden_states


@dataclass(frozen=True)
class Factors:
    """Second moments of one layer, averaged over tokens.

    inputs: A = E[a a^T], float64 `[in, in]`
    gradients: G = E[g g^T], float64 `[out, out]`
    """

    inputs: Tensor
    gradients: Tensor


def kfac_factors(
    model: Any, layers: Mapping[str, nn.Linear], windows: Tensor, *, seed: int
) -> dict[str, Factors]:
    """The factors of each layer on windows of public text, int64 `[count, length]`.

    Labels are drawn from the model's own predictions, as the Fisher information asks for (Martens
    and Grosse 2015, section 2.2; Merullo et al. 2025, section 7), so no label is read. A window's
    last position predicts nothing that is scored, and is left out.
    """
    sums = {
        name: Factors(
            _zeros(layer.in_features, layer.weight.device),
            _zeros(layer.out_features, layer.weight.device),
        )
        for name, layer in layers.items()
    }

    def listen(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            # The graph starts at the first layer that is asked for, and not before.
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            _add_moment(sums[name].inputs, inputs[0])
            output.register_hook(lambda gradient: _add_moment(sums[name].gradients, gradient))
            return output

        return hook

    generator = torch.Generator().manual_seed(seed)
    head = model.get_output_embeddings()
    flags = [(p, p.requires_grad) for p in model.parameters()]
    handles = [layer.register_forward_hook(listen(name)) for name, layer in layers.items()]
    try:
        model.requires_grad_(False)
        with evaluating(model):
            for window in tqdm(windows, desc="curvature", unit="window", disable=None, leave=False):
                logits = head(hidden_states(model, window[None])[0, :-1]).float()
                drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)
                F.cross_entropy(logits, drawn[:, 0].to(logits.device), reduction="sum").backward()
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    return {
        name: Factors(total.inputs / tokens, total.gradients / tokens)
        for name, total in sums.items()
    }


@dataclass(frozen=True)
class CurvatureBasis:
    """One weight in the eigenbases of its factors, entries with their curvature.

    out_basis: U_G, float64 `[out, out]`; in_basis: U_A, float64 `[in, in]`
    coefficients: C = U_G^T W U_A, float64 `[out, in]`
    curvature: l_i * m_j, float64 `[out, in]`, not negative
    """

    weight: Tensor
    out_basis: Tensor
    in_basis: Tensor
    coefficients: Tensor
    curvature: Tensor

    @classmethod
    def of(cls, weight: Tensor, factors: Factors, name: str = "weight") -> CurvatureBasis:
        """Rotate a weight `[out, in]`; raises `SeparationError` for factors that are not finite."""
        for factor in (factors.inputs, factors.gradients):
            if not bool(torch.isfinite(factor).all()):
                raise SeparationError(
                    f"the curvature of {name} is NaN or infinite: activations or gradients "
                    "overflow in this precision. Load the model in float32."
                )
        in_values, in_basis = torch.linalg.eigh(factors.inputs)
        out_values, out_basis = torch.linalg.eigh(factors.gradients)
        wide = weight.detach().to(torch.float64)
        curvature = out_values.clamp_min(0)[:, None] * in_values.clamp_min(0)  # [out, in]
        coefficients = out_basis.t() @ wide @ in_basis
        return cls(weight.detach(), out_basis, in_basis, coefficients, curvature)

    def keeps(self, mass: float) -> Tensor:
        """Bool `[out, in]`: the fewest entries with at least a share of the curvature, in (0, 1].

        Entries are taken in descending order of curvature; a share of 1 takes them all, those
        without any curvature as well.
        """
        if not 0.0 < mass <= 1.0:
            raise ShapeError(f"the kept share of the curvature must be in (0, 1]; found {mass}.")
        if mass == 1.0:
            return torch.ones_like(self.curvature, dtype=torch.bool)
        ordered = self.curvature.flatten().sort(descending=True, stable=True)
        reached = ordered.values.cumsum(0)
        wanted = int(torch.searchsorted(reached, mass * reached[-1])) + 1
        kept = torch.zeros(reached.shape, dtype=torch.bool, device=reached.device)
        kept[ordered.indices[:wanted]] = True
        return kept.view_as(self.curvature)

    def kept_weight(self, mass: float) -> Tensor:
        """The weight without the entries of the lowest curvature, in its own dtype `[out, in]`.

        What is dropped is subtracted, so that a share of 1 gives the weight itself, bit for bit.
        """
        dropped = self.coefficients.masked_fill(self.keeps(mass), 0.0)
        tail = self.out_basis @ dropped @ self.in_basis.t()
        return (self.weight.to(torch.float64) - tail).to(self.weight.dtype)


def _add_moment(total: Tensor, rows: Tensor) -> None:
    """Add the second moment of `[1, length, features]`, all positions but the last one."""
    x = rows.detach()[0, :-1].float()
    total.add_((x.t() @ x).to(total.dtype))


def _zeros(size: int, device: torch.device) -> Tensor:
    return torch.zeros(size, size, dtype=torch.float64, device=device)
