"""What users do wrong: each is a ValueError or TypeError that says what was expected and what came."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import specedit_kernels as kernels
from specedit_kernels import checks

X, INDEX = torch.zeros(2, 5, 8), torch.tensor([0, 3])
Q, CU = torch.zeros(6, 2, 16), torch.tensor([0, 2, 6], dtype=torch.int32)
WEIGHT, ANGLES = torch.ones(16), torch.ones(6, 8)
META = torch.device("meta")
BOTH = {"cu_seqlens_q": CU, "cu_seqlens_k": CU}
RIGHT = {
    "gather_tokens": (X, INDEX),
    "scatter_tokens": (X[:, :2].clone(), INDEX, X),
    "expand_tokens": (X, 0.5),
    "contract_tokens": (torch.zeros(2, 5, 4, 8), 0.5),
    "mixed_attention": (Q[None], Q[None], Q[None]),
    "qk_norm_rope": (Q, Q, WEIGHT, WEIGHT, ANGLES, ANGLES),
    "weighted_sum": (X, torch.ones(2)),
}


def ends(*values):
    return torch.tensor(values, dtype=torch.int32)


def attend(**change):
    return lambda: kernels.mixed_attention(Q, Q, Q, **(BOTH | change))


def norm_rope(*change, **more):
    arguments = list(RIGHT["qk_norm_rope"])
    for at, value in change:
        arguments[at] = value
    return lambda: kernels.qk_norm_rope(*arguments, **more)


WRONG = {
    "gather, index too large": (lambda: kernels.gather_tokens(X, INDEX + 2), ValueError, r"\[0, 5\), got .* to 5"),
    "gather, negative index": (lambda: kernels.gather_tokens(X, INDEX - 1), ValueError, r"\[0, 5\), got .* -1"),
    "scatter, index too large": (
        lambda: kernels.scatter_tokens(X[:, :2], INDEX + 2, X), ValueError, r"\[0, 5\), got .* to 5",
    ),
    "norm_rope, out_index too large": (
        norm_rope(out_index=torch.arange(6) + 1, out=(Q.clone(), Q.clone())), ValueError, r"\[0, 6\), got .* 1 to 6",
    ),
    "gather, float index": (lambda: kernels.gather_tokens(X, INDEX.float()), TypeError, "int64, got float32"),
    "scatter, float index": (
        lambda: kernels.scatter_tokens(X[:, :2], INDEX.float(), X), TypeError, "int64, got float32",
    ),
    "scatter, dtype mix": (
        lambda: kernels.scatter_tokens(X[:, :2].half(), INDEX, X), TypeError,
        "src: expected dtype float32, got float16",
    ),
    "attention, dtype mix": (
        lambda: kernels.mixed_attention(Q, Q, Q.half(), **BOTH), TypeError, "v: expected dtype float32, got float16",
    ),
    "norm_rope, dtype mix": (norm_rope((1, Q.half())), TypeError, "k: expected dtype float32, got float16"),
    "gather, device mix": (lambda: kernels.gather_tokens(X, INDEX.to(META)), ValueError, "index: .* cpu, got meta"),
    "scatter, device mix": (
        lambda: kernels.scatter_tokens(X[:, :2].to(META), INDEX, X), ValueError, "src: expected device cpu, got meta",
    ),
    "expand, device mix": (
        lambda: kernels.expand_tokens(X, 0.5, noise=torch.zeros(2, 5, 4, 2, 3, device=META)), ValueError,
        "noise: expected device cpu, got meta",
    ),
    "attention, device mix": (attend(key_bias=torch.zeros(6, device=META)), ValueError, "key_bias: .* cpu, got meta"),
    "norm_rope, device mix": (norm_rope((4, ANGLES.to(META))), ValueError, "cos: expected device cpu, got meta"),
    "attention, shapes": (
        lambda: kernels.mixed_attention(Q, Q[:, :1], Q, **BOTH), ValueError,
        r"v: expected shape \(6, 1, 16\), got \(6, 2, 16\)",
    ),
    "norm_rope, shapes": (norm_rope((5, ANGLES[:5])), ValueError, r"sin: expected shape \(6, 8\), got \(5, 8\)"),
    "cu_seqlens_q ends early": (attend(cu_seqlens_q=ends(0, 2, 5)), ValueError, "cu_seqlens_q: .* 0 to 6, got 0 to 5"),
    "cu_seqlens_k ends late": (attend(cu_seqlens_k=ends(0, 2, 7)), ValueError, "cu_seqlens_k: .* 0 to 6, got 0 to 7"),
    "cu_seqlens go backwards": (
        attend(cu_seqlens_q=ends(0, 4, 2, 6), cu_seqlens_k=ends(0, 2, 4, 6)), ValueError,
        "cu_seqlens_q: expected offsets that never decrease, got 4 then 2",
    ),
    "only cu_seqlens_q": (attend(cu_seqlens_k=None), ValueError, "got cu_seqlens_q without cu_seqlens_k"),
    "only cu_seqlens_k": (attend(cu_seqlens_q=None), ValueError, "got cu_seqlens_k without cu_seqlens_q"),
    "bias of the wrong length": (
        attend(key_bias=torch.zeros(5)), ValueError, r"key_bias: expected shape \(6,\), got \(5,\)",
    ),
    "scale of text": (attend(scale="0.5"), TypeError, "scale: expected a number, got str"),
    "eps of text": (norm_rope(eps="1e-6"), TypeError, "eps: expected a number, got str"),
    "eps nan": (norm_rope(eps=math.nan), ValueError, "eps: expected a number of at least 0, got nan"),
} | {
    f"{name}, sigma {sigma}": (
        lambda name=name, sigma=sigma: getattr(kernels, name)(RIGHT[name][0], sigma), ValueError,
        rf"sigma(_fine)?: expected a value inside \(0, 1\), got {sigma}",
    )
    for name in ("expand_tokens", "contract_tokens") for sigma in (0.0, 1.0, -0.5, 1.5, math.nan, math.inf)
} | {
    f"{name}, unknown backend": (
        lambda name=name: getattr(kernels, name)(*RIGHT[name], backend="cuda"), ValueError,
        "backend: expected one of .*triton.*torch.*, got 'cuda'",
    )
    for name in RIGHT
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(case):
    call, error, text = WRONG[case]
    with pytest.raises(error, match=text) as caught:
        call()
    assert "expected" in str(caught.value) and "got" in str(caught.value)


@pytest.mark.parametrize("name", RIGHT)
def test_corrected_calls_pass(name):
    getattr(kernels, name)(*RIGHT[name], backend="torch")


@pytest.mark.parametrize("sigma", [np.float32(0.5), np.float64(0.5), torch.tensor(0.5), torch.tensor([0.5])], ids=repr)
def test_sigma_of_a_scheduler(sigma):
    assert kernels.expand_tokens(X, sigma)[1] == pytest.approx(2 / 3)


OFF, ON = ("0", "", "false", "False", "no", "off", " 0 "), ("1", "true", "TRUE", "yes", "on")


@pytest.mark.parametrize("value,raises", [(None, False), *((v, False) for v in OFF), *((v, True) for v in ON)])
def test_the_debug_switch_decides_whether_values_on_a_gpu_are_read(monkeypatch, value, raises):
    """Without it the host must not wait for them; the CPU's values are read either way."""
    monkeypatch.delenv("SPECEDIT_KERNELS_DEBUG", raising=False)
    if value is not None:
        monkeypatch.setenv("SPECEDIT_KERNELS_DEBUG", value)
    on_gpu = SimpleNamespace(
        device=torch.device("cuda"), numel=lambda: 2, aminmax=lambda: (0, 9), tolist=lambda: [0, 9],
        sort=lambda dim: SimpleNamespace(values=torch.tensor([0, 9])),
    )  # fmt: skip
    for check in (lambda: checks.check_index_values("index", on_gpu, 5, unique=True),
                  lambda: checks.check_cu_seqlens_values("cu_seqlens_q", on_gpu, 5)):  # fmt: skip
        if raises:
            with pytest.raises(ValueError, match=r"expected .* 5.* got .* 9"):
                check()
        else:
            check()
    with pytest.raises(ValueError, match="got values from 0 to 3"):
        checks.check_index_values("index", INDEX, 3)


def test_unknown_debug_switch_is_rejected(monkeypatch):
    monkeypatch.setenv("SPECEDIT_KERNELS_DEBUG", "maybe")
    with pytest.raises(ValueError, match=r"SPECEDIT_KERNELS_DEBUG: expected 0, 1, false, .* got 'maybe'"):
        checks.debug_enabled()
