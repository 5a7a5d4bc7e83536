"""What the methods that leave out tokens have in common."""

import pytest

import specedit
from specedit.models.flux import FluxKontext


@pytest.mark.parametrize("name", ["spotedit", "regione"])
def test_what_they_cannot_run_on_is_refused_before_any_work(pipe, monkeypatch, name):
    with pytest.raises(ValueError, match=rf"^attention: expected .* with method='{name}'.*got 'stock'"):
        specedit.install(pipe, method=name, attention="stock")
    monkeypatch.setattr(FluxKontext, "skips_tokens", False)
    with pytest.raises(ValueError, match=r"^method: expected another one .* flux-kontext computes all tokens or none"):
        specedit.install(pipe, method=name)
    assert not hasattr(pipe, "_specedit")
