"""DuCa (arXiv 2412.18911): aggressive and conservative cached steps take turns."""

from __future__ import annotations

from dataclasses import dataclass

from ..forecast_options import register_forecast
from .toca import FRESH_RATIO, STALENESS_WEIGHT, ToCa


@register_forecast
@dataclass(frozen=True)
class DuCa(ToCa):
    """Odd steps after a full one reuse everything (as FORA), even ones recompute tokens (as ToCa). Exact for constants.

    Paper and public code (Shenyi-Z/DuCa, "Aggressive-DuCa-Aggressive") agree on the order. With interval=2 there are
    no even steps, so the options of ToCa have no effect there.
    """

    name = "duca"

    def validate(self) -> None:
        super().validate()
        if self.interval == 2:
            for field, default in (("fresh_ratio", FRESH_RATIO), ("staleness_weight", STALENESS_WEIGHT)):
                if (got := getattr(self, field)) != default:
                    raise ValueError(f"{field}: expected the default with interval=2, where DuCa reuses, got {got!r}")

    def recomputes(self, since: int) -> bool:
        return since % 2 == 0
