"""What the guide that libortho began from promises of decoding, as quoted there.

Promises, not measurements. Cards for which nobody here has the guide's figure are left out.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Claim:
    """Decoding at batch 1, promised for a card.

    profile: the profile of that card; card: the card's name as drivers give it, or a part of it
    low, high: tokens per second
    """

    profile: str
    card: str
    model: str
    low: float
    high: float


CLAIMS = (
    Claim("gtx4050", "RTX 4050", "llama-3.2-3b", 20.0, 30.0),
    Claim("gtx4050", "RTX 4050", "llama-3-8b", 8.0, 15.0),
)

GUIDE_MODELS = tuple(claim.model for claim in CLAIMS)
