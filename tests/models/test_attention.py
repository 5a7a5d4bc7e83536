"""The processors, one attention module at a time, against stock attention and against sums written out."""

import copy
import inspect

import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor, FluxPosEmbed
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0
from torch._dynamo.testing import CompileCounter

from specedit.models.attention import processors as attention
from specedit.models.attention.contexts import Masked, Mixed, Packed, PhaseAligned, Stock
from specedit.models.attention.kept_keys import Partial, Storing
from specedit.models.attention.processors import (
    FluxMixedProcessor,
    QwenMixedProcessor,
    attach,
    detach,
    half_table,
    why_unsupported_processor,
)
from specedit.models.attention.sequences import QueryRows, pack, segments

HEADS, DIM, TEXT = 2, 16, 3
POS_EMBED = FluxPosEmbed(theta=10000, axes_dim=(4, 4, 8))


def make_attention(joint):
    torch.manual_seed(0)
    extra = dict(added_kv_proj_dim=32, context_pre_only=False) if joint else dict(pre_only=True)
    attn = FluxAttention(query_dim=32, dim_head=DIM, heads=HEADS, out_dim=32, bias=True, eps=1e-6, **extra).eval()
    with torch.no_grad():
        for name, parameter in attn.named_parameters():
            parameter.mul_(1.0 if "norm" in name else 3.0)  # logits far from uniform
    return attn.requires_grad_(False)


@pytest.fixture(params=[True, False], ids=["joint", "single"])
def attn(request):
    return make_attention(request.param)


def some_ids(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 9, (n, 3), generator=generator).float() + 0.5
    ids[:, 0] = 0
    ids[:TEXT] = 0
    return ids


def tables(ids):
    """cos and sin (S, D/2) of position ids, as a context holds them."""
    return tuple(half_table(table) for table in POS_EMBED(ids))


def dense(ids, kind=Mixed, **more):
    """A context of sequences of one length."""
    return kind(rotary=tables(ids), index=torch.arange(len(ids)), **more)


def run(attn, states, ids, **kwargs):
    """All output rows, text first, of states (B, text + image, 32)."""
    rotary = POS_EMBED(ids)
    if attn.added_kv_proj_dim is None:
        return attn(states, image_rotary_emb=rotary, **kwargs)
    image, text = attn(states[:, TEXT:], states[:, :TEXT], image_rotary_emb=rotary, **kwargs)
    return torch.cat([text, image], 1)


def mixed(attn):
    attn = copy.deepcopy(attn)
    attn.set_processor(FluxMixedProcessor(attn.processor))
    return attn


def random_states(batch, n):
    return torch.randn(batch, n, 32, generator=torch.Generator().manual_seed(1))


def test_without_a_context_it_is_the_original(attn):
    states, ids = random_states(2, 11), some_ids(11)
    assert torch.equal(run(mixed(attn), states, ids), run(attn, states, ids))


def test_without_a_bias_it_is_stock_attention(attn):
    states, ids = random_states(2, 11), some_ids(11)
    torch.testing.assert_close(
        run(mixed(attn), states, ids, specedit=dense(ids)), run(attn, states, ids), rtol=1e-4, atol=1e-5
    )


def test_log_area_bias_equals_repeating_each_token_area_times(attn):
    area = torch.tensor([1] * TEXT + [4, 4, 1, 2, 1, 1, 4, 3])
    n = len(area)
    states, ids = random_states(2, n), some_ids(n)
    got = run(mixed(attn), states, ids, specedit=dense(ids, key_bias=area.float().log()))
    first = area.cumsum(0) - area
    repeated = run(attn, states.repeat_interleave(area, 1), ids.repeat_interleave(area, 0))
    torch.testing.assert_close(got, repeated[:, first], rtol=1e-4, atol=1e-5)
    plain = run(attn, states, ids)
    assert (got - plain).abs().max() > 0.05  # the bias matters


def test_an_attention_mask_does_the_same_to_stock_attention(attn):
    bias = torch.tensor([1] * TEXT + [4, 1, 1, 2, 1, 1]).float().log()
    states, ids = random_states(2, len(bias)), some_ids(len(bias))
    got = run(mixed(attn), states, ids, specedit=dense(ids, key_bias=bias))
    stock = run(attn, states, ids, attention_mask=bias[None, None, None])
    torch.testing.assert_close(got, stock, rtol=1e-4, atol=1e-5)


def rotate(x, cos, sin):
    """Interleaved pairs (x0, x1) of (B, N, H, D) turned by the angles of tables (N, D)."""
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return x * cos[:, None] + turned * sin[:, None]


@pytest.mark.parametrize("biased", [True, False])
def test_phase_aligned_against_the_sums_written_out(attn, biased):
    coarse = torch.tensor([False] * TEXT + [True, True, False, False, True, False, False])
    n = len(coarse)
    states, ids = random_states(2, n), some_ids(n)
    small = ids.clone()
    small[TEXT:, 1:] /= 2
    bias = torch.where(coarse, torch.tensor(4.0).log(), torch.tensor(0.0)) if biased else None
    context = dense(ids, key_bias=bias, aligned=PhaseAligned(tables(small), segments(coarse)))
    got = run(mixed(attn), states, ids, specedit=context)

    text, image = (states[:, :TEXT], states[:, TEXT:]) if attn.added_kv_proj_dim else (states[:, :0], states)
    q, k, v = (
        torch.cat([a, b], 1).unflatten(-1, (HEADS, DIM))
        for a, b in zip(
            (attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text)) if text.shape[1] else (text,) * 3,
            (attn.to_q(image), attn.to_k(image), attn.to_v(image)),
            strict=True,
        )
    )
    rms = lambda x: x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()  # noqa: E731
    q, k = rms(q), rms(k)  # the norms' own weights are one
    logits = []
    for pair in (POS_EMBED(ids), POS_EMBED(small)):  # every pair of tokens seen at the fine and the coarse scale
        logits.append(torch.einsum("bihd,bjhd->bhij", rotate(q, *pair), rotate(k, *pair)) / DIM**0.5)
    logits = torch.where(coarse[:, None], logits[1], logits[0])
    if biased:
        logits = logits + bias
    out = torch.einsum("bhij,bjhd->bihd", logits.softmax(-1), v).flatten(2)
    if text.shape[1]:
        out = torch.cat([attn.to_add_out(out[:, :TEXT]), attn.to_out[0](out[:, TEXT:])], 1)
    torch.testing.assert_close(got, out, rtol=1e-4, atol=1e-5)
    assert (got - run(attn, states, ids)).abs().max() > 0.01


def test_fused_projections(attn):
    states, ids = random_states(1, 9), some_ids(9)
    context = dense(ids, key_bias=torch.linspace(0, 1, 9))
    expected = run(mixed(attn), states, ids, specedit=context)
    fused = mixed(attn)
    fused.fuse_projections()
    assert fused.fused_projections
    torch.testing.assert_close(run(fused, states, ids, specedit=context), expected, rtol=1e-4, atol=1e-5)


def test_half_table_takes_every_angle_once():
    cos, _ = POS_EMBED(some_ids(5))
    half = half_table(cos)
    assert half.dtype == torch.float32 and half.is_contiguous()
    torch.testing.assert_close(half.repeat_interleave(2, 1), cos.float())


@pytest.mark.parametrize("mark", ["_diffusers_hook", "_hf_hook"])
def test_a_norm_that_is_offloaded_by_itself_is_called(mark):
    """Its weight may be on the device and not there yet: what it holds before the call counts for nothing."""
    norms, right = [torch.nn.RMSNorm(8, eps=1e-6) for _ in range(2)], [torch.rand(8) + 0.5 for _ in range(2)]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 3, 2, 8, generator=generator) for _ in range(3))
    angle = torch.rand(3, 4, generator=generator)
    angles, rows = (angle.cos(), angle.sin()), torch.tensor([2, 0, 1])

    def arrives(norm, weight):
        norm.weight.copy_(weight)

    def placed():
        out = [torch.full_like(q, torch.nan) for _ in range(3)]
        attention._norm_rope_scatter(q, k, v, *norms, *angles, out, rows, "torch")
        return [*out, attention._norm_and_rotate(q, norms[0], *angles, "torch")]

    with torch.no_grad():
        for norm, weight in zip(norms, right, strict=True):
            norm.weight.copy_(weight)
        wanted = placed()
        for norm, weight in zip(norms, right, strict=True):
            norm.weight.fill_(torch.nan)
            setattr(norm, mark, object())
            norm.register_forward_pre_hook(lambda module, _, weight=weight: arrives(module, weight))
        for got, expected in zip(placed(), wanted, strict=True):
            torch.testing.assert_close(got, expected)


def test_attach_and_detach_put_back_the_very_objects():
    model = torch.nn.ModuleList([make_attention(True), make_attention(False)])
    before = [module.processor for module in model]
    for _ in range(2):  # the second time nothing is left to wrap
        attach(model, FluxAttention, FluxMixedProcessor)
    assert [module.processor.original for module in model] == before
    assert all("forward" in vars(module) for module in model)
    detach(model, FluxAttention)
    assert all(module.processor is processor for module, processor in zip(model, before, strict=True))
    assert not any("forward" in vars(module) for module in model)
    detach(model, FluxAttention)
    assert all(module.processor is processor for module, processor in zip(model, before, strict=True))


def test_the_processors_signature_is_read_for_unknown_arguments_alone(attn, monkeypatch):
    states, ids = random_states(2, 11), some_ids(11)
    expected = run(attn, states, ids)
    attach(torch.nn.ModuleList([attn]), FluxAttention, FluxMixedProcessor)
    read, signature = [], inspect.signature
    monkeypatch.setattr(inspect, "signature", lambda function: read.append(1) or signature(function))
    streams = {"hidden_states": states}
    if attn.added_kv_proj_dim is not None:
        streams = {"hidden_states": states[:, TEXT:], "encoder_hidden_states": states[:, :TEXT]}
    for more, count in (({}, 0), ({"ip_adapter_masks": None}, 1)):
        got = attn(**streams, image_rotary_emb=POS_EMBED(ids), **more)
        got = torch.cat(got[::-1], 1) if isinstance(got, tuple) else got
        assert torch.equal(got, expected) and len(read) == count
    detach(torch.nn.ModuleList([attn]), FluxAttention)


def test_a_processor_with_weights_is_left_alone():
    class Weighty(torch.nn.Module):
        pass

    model = torch.nn.ModuleList([make_attention(False)])
    model[0].set_processor(Weighty())
    attach(model, FluxAttention, FluxMixedProcessor)
    assert isinstance(model[0].processor, Weighty)
    assert "0.processor" in dict(model.named_modules())


def test_third_party_processors_keep_their_arguments():
    class Mine(FluxAttnProcessor):
        def __call__(self, attn, states, text=None, attention_mask=None, image_rotary_emb=None, strength=1.0):
            return strength * states

    attn = make_attention(False)
    attn.set_processor(Mine())
    attach(torch.nn.ModuleList([attn]), FluxAttention, FluxMixedProcessor)
    assert (attn(torch.ones(1, 2, HEADS * DIM), strength=0.5) == 0.5).all()


def test_processors_with_weights_run_stock_without_a_replacement():
    model = torch.nn.ModuleList([make_attention(False)])
    model[0].set_processor(type("Weighty", (torch.nn.Module,), {"__module__": "diffusers.models"})())
    assert why_unsupported_processor(model, FluxAttention, None).startswith(
        "an attention processor with weights is loaded"
    )
    for backend in ("triton", "stock"):  # FLUX's adapter has its own words for an IP-Adapter
        assert why_unsupported_processor(model, FluxAttention, backend) is None


def test_an_attention_backend_reaches_the_original():
    original = FluxAttnProcessor()
    processor = FluxMixedProcessor(original)
    processor._attention_backend, processor._parallel_config = "native", "parallel"
    assert (original._attention_backend, original._parallel_config) == ("native", "parallel")
    assert processor._attention_backend == "native" and processor._parallel_config == "parallel"


def test_made_without_arguments_it_wraps_a_stock_processor():
    assert isinstance(FluxMixedProcessor().original, FluxAttnProcessor)  # as loading an IP-Adapter makes it


# ---------------------------------------------------------------------------------------------- several sequences


def make_qwen_attention():
    torch.manual_seed(0)
    attn = Attention(
        query_dim=32, added_kv_proj_dim=32, dim_head=DIM, heads=HEADS, out_dim=32, context_pre_only=False, bias=True,
        processor=QwenDoubleStreamAttnProcessor2_0(), qk_norm="rms_norm", eps=1e-6,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for name, parameter in attn.named_parameters():
            parameter.mul_(1.0 if "norm" in name else 3.0)
    return attn.requires_grad_(False)


@pytest.mark.parametrize("backend", [None, "torch", "stock"])
def test_qwen_attention_is_the_stock_one(backend):
    stock = make_qwen_attention()
    ours = copy.deepcopy(stock)
    ours.set_processor(QwenMixedProcessor(ours.processor))
    text, image = random_states(2, 3), random_states(2, 8) * 2
    angle = torch.randn(11, DIM // 2, generator=torch.Generator().manual_seed(2))
    phases = torch.polar(torch.ones_like(angle), angle)
    expected = stock(image, encoder_hidden_states=text, image_rotary_emb=(phases[3:], phases[:3]))
    same = ours(image, encoder_hidden_states=text, image_rotary_emb=(phases[3:], phases[:3]))
    assert all(torch.equal(a, b) for a, b in zip(same, expected, strict=True))
    given = dict(rotary=(angle.cos(), angle.sin()), index=torch.arange(11))
    if backend == "stock":
        context = Masked(**given, key_bias=torch.zeros(11))
    else:
        context = Mixed(**given, backend=backend)
    got = ours(image, encoder_hidden_states=text, specedit=context)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("phase_aligned", [False, True])
def test_packed_sequences_do_not_see_each_other(phase_aligned):
    attn = make_qwen_attention()
    attn.set_processor(QwenMixedProcessor(attn.processor))
    generator = torch.Generator().manual_seed(4)
    texts, target, reference = [1, 4, 2], 5, 3
    images = target + reference
    packing = pack(texts, target, reference, "cpu")
    total = sum(texts) + 3 * images
    text, image = (torch.randn(1, n, 32, generator=generator) for n in (sum(texts), 3 * images))
    angle, small = (torch.randn(total, DIM // 2, generator=generator) for _ in range(2))
    bias = torch.rand(total, generator=generator)
    coarse = torch.zeros(total, dtype=torch.bool)
    coarse[packing.image] = torch.rand(3 * images, generator=generator) < 0.5
    rotary = {name: (a.cos(), a.sin()) for name, a in (("fine", angle), ("coarse", small))}
    aligned = PhaseAligned(rotary["coarse"], segments(coarse, [n + images for n in texts])) if phase_aligned else None
    context = Packed(rotary=rotary["fine"], key_bias=bias[None], aligned=aligned, packing=packing)
    out_image, out_text = attn(image, encoder_hidden_states=text, specedit=context)
    for i, n in enumerate(texts):
        words = torch.arange(n) + sum(texts[:i])
        own = torch.cat([torch.arange(target) + i * target, torch.arange(reference) + 3 * target + i * reference])
        rows = torch.cat([words, own + sum(texts)])  # of the streams
        places = torch.cat([packing.text[words], packing.image[own]])
        fine, small = (tuple(t[rows] for t in pair) for pair in rotary.values())
        aligned = PhaseAligned(small, segments(coarse[places])) if phase_aligned else None
        alone = Mixed(rotary=fine, index=torch.arange(len(rows)), key_bias=bias[places][None], aligned=aligned)
        got = attn(image[:, own], encoder_hidden_states=text[:, words], specedit=alone)
        torch.testing.assert_close(out_image[:, own], got[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(out_text[:, words], got[1], rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------- some rows alone


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("backend", [None, "stock"])
@pytest.mark.parametrize("aligned", [False, True])
def test_some_rows_alone_are_those_rows_of_all(attn, fused, backend, aligned):
    if aligned and backend == "stock":
        pytest.skip("stock attention knows one scale")
    coarse = torch.tensor([False] * TEXT + [True, True, False, False, True, False, False, True])
    n, states, ids = len(coarse), random_states(2, len(coarse)), some_ids(len(coarse))
    attn = mixed(attn)
    if fused:
        attn.fuse_projections()
    joint = attn.added_kv_proj_dim is not None
    rows = slice(0, 5) if joint else slice(TEXT, TEXT + 5)  # of the image stream, or of text and image
    if backend == "stock":
        context = dense(ids, Masked, key_bias=coarse.float())
    else:
        some = PhaseAligned(tables(ids / 2), segments(coarse)) if aligned else None
        queries = QueryRows(torch.arange(5), segments(coarse[TEXT : TEXT + 5], [5], [n]))
        context = dense(ids, key_bias=coarse.float(), aligned=some, backend=backend, output_rows=queries)
    whole = run(attn, states, ids, specedit=context)[:, TEXT : TEXT + 5]
    given = dict(specedit=context, rows=rows)
    streams = (states[:, TEXT:], states[:, :TEXT]) if joint else (states,)
    torch.testing.assert_close(attn(*streams, **given), whole, rtol=1e-4, atol=1e-5)


def test_a_stock_context_is_the_original_but_for_some_rows(attn):
    states, ids = random_states(2, 11), some_ids(11)
    context = Stock(rotary=tables(ids), output_rows=QueryRows(torch.arange(5)))
    whole = run(attn, states, ids)
    assert torch.equal(run(mixed(attn), states, ids, specedit=context), whole)
    joint = attn.added_kv_proj_dim is not None
    streams = (states[:, TEXT:], states[:, :TEXT]) if joint else (states,)
    rows = slice(0, 5) if joint else slice(TEXT, TEXT + 5)
    some = mixed(attn)(*streams, specedit=context, rows=rows)
    torch.testing.assert_close(some, whole[:, TEXT : TEXT + 5], rtol=1e-4, atol=1e-5)


def test_some_rows_of_packed_sequences():
    attn = make_qwen_attention()
    attn.set_processor(QwenMixedProcessor(attn.processor))
    generator = torch.Generator().manual_seed(4)
    texts, target, reference = [1, 4], 5, 3
    packing = pack(texts, target, reference, "cpu")
    total = sum(texts) + 2 * (target + reference)
    text, image = (torch.randn(1, n, 32, generator=generator) for n in (sum(texts), total - sum(texts)))
    angle = torch.randn(total, DIM // 2, generator=generator)
    read = QueryRows(torch.arange(2 * target), cu_seqlens=torch.tensor([0, 5, 10], dtype=torch.int32))
    context = Packed(
        rotary=(angle.cos(), angle.sin()), key_bias=torch.rand(1, total, generator=generator), packing=packing,
        output_rows=read,
    )  # fmt: skip
    given = dict(encoder_hidden_states=text, specedit=context)
    whole, _ = attn(image, **given)
    alone = attn(image, **given, rows=slice(0, 2 * target))
    torch.testing.assert_close(alone, whole[:, : 2 * target], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_partial_rows_with_stored_keys_equal_those_rows_of_the_full_pass(attn, fused):
    states, ids = random_states(2, 11), some_ids(11)
    attn = mixed(attn)
    if fused:
        attn.fuse_projections()
    whole, entries = dense(ids, key_bias=torch.rand(11)), {}
    expected = run(attn, states, ids, specedit=whole)
    assert torch.equal(run(attn, states, ids, specedit=Storing(whole=whole, entries=entries)), expected)
    assert list(entries) == [attn] and entries[attn][0].shape == (2, 11, HEADS, DIM)
    chosen = torch.tensor([[0, 1, 2, 4, 6], [0, 1, 2, 9, 3]])  # text and two others, of each sample its own
    partial = Partial(
        whole=whole, entries=entries, rows=chosen, rotary=tuple(table[chosen] for table in whole.rotary),
        index=whole.index, query_rows=QueryRows(torch.arange(5)), output_rows=None,
    )  # fmt: skip
    some = states.gather(1, chosen[..., None].expand(-1, -1, 32))
    got = run(attn, some, some_ids(5), specedit=partial)
    wanted = expected.gather(1, chosen[..., None].expand(-1, -1, expected.shape[2]))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_storing_compiles_once_for_all_modules():
    """As many attention modules as a real model has would be beyond the compiler's limit."""
    counter = CompileCounter()
    torch._dynamo.reset()

    @torch.compile(backend=counter)
    def store(context, attn, k, v):
        return context.update_kv_cache(attn, 2 * k, v)

    x = torch.randn(1, 4, 2, 8)
    context = Storing(whole=dense(some_ids(4)), entries={})
    modules = [torch.nn.Identity() for _ in range(5)]
    for module in modules:
        assert torch.equal(store(context, module, x, x)[0], 2 * x)
    assert list(context.entries) == modules and counter.frame_count <= 2
