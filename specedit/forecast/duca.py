"""DuCa (arXiv 2412.18911): aggressive and conservative cached steps take turns."""

from __future__ import annotations

from .toca import ToCa


class DuCa(ToCa):
    """Odd steps after a full one reuse everything (as FORA), even ones recompute tokens (as ToCa). Exact for constants.

    Paper and public code (Shenyi-Z/DuCa, "Aggressive-DuCa-Aggressive") agree on the order.
    """

    @staticmethod
    def recomputes(since: int) -> bool:
        return since % 2 == 0
