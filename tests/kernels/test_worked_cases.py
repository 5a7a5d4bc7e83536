"""The worked cases of docs/backend.md, run from the page itself."""

import re
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel

import specedit_kernels as kernels

PAGE = (Path(__file__).parents[2] / "docs" / "backend.md").read_text()


def blocks(heading):
    """The Python blocks under a heading of the page, joined."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    return "\n\n".join(re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL))


@pytest.fixture
def merging():
    names = {"torch": torch, "kernels": kernels}
    exec(compile(blocks("Token merging through gather and scatter"), "docs/backend.md", "exec"), names)
    return names


def test_merging_averages_and_gives_back(merging, device, rng):
    x = torch.randn(2, 20, 16, generator=rng).to(device)
    plan = merging["merge_plan"](x, 0.3)
    kept, merged, destination = plan
    for b in range(2):
        assert sorted([*kept[b].tolist(), *merged[b].tolist()]) == list(range(20)) and merged.shape == (2, 6)
    short, sizes = merging["merge"](x, plan)
    torch.testing.assert_close((short * sizes.unsqueeze(-1)).sum(1), x.sum(1))
    back = merging["unmerge"](short, plan)
    for b in range(2):
        torch.testing.assert_close(back[b, kept[b]], short[b])
        torch.testing.assert_close(back[b, merged[b]], short[b, destination[b]])


def test_merging_equal_tokens_changes_nothing(merging, device, rng):
    """Pairs of equal tokens merge without loss, and the bias makes attention over them exact."""
    x = torch.randn(2, 12, 32, generator=rng).repeat_interleave(2, dim=1).to(device)
    out = merging["merged_attention"](x, 2, 0.5)
    q = x.unflatten(-1, (2, -1))
    torch.testing.assert_close(out, kernels.mixed_attention(q, q, q).flatten(-2), atol=1e-5, rtol=1e-5)


def test_diffusers_backend_as_on_the_page(device):
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=32, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(8, 12, 12),
    ).eval().to(device)  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 12, 16), "encoder_hidden_states": torch.randn(1, 5, 32),
        "pooled_projections": torch.randn(1, 16), "timestep": torch.tensor([0.5]),
        "img_ids": torch.randint(4, (12, 3)).float(), "txt_ids": torch.zeros(5, 3),
    }  # fmt: skip
    inputs = {name: x.to(device) for name, x in inputs.items()}
    with torch.no_grad():
        want = model(**inputs).sample
    names = {"torch": torch, "kernels": kernels, "model": model, "inputs": inputs}
    exec(compile(blocks("The diffusers attention backend"), "docs/backend.md", "exec"), names)
    torch.testing.assert_close(names["out"], want, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        assert torch.equal(model(**inputs).sample, want)


def test_attention_over_the_most_similar_blocks(device, rng):
    """With two groups of keys apart, half of the blocks gives what all of them give; with every block, exactly."""
    names = {"torch": torch, "kernels": kernels}
    exec(compile(blocks("Attention over some of the keys"), "docs/backend.md", "exec"), names)
    q = torch.randn(2, 256, 2, 16, generator=rng).to(device)
    q[:, :128, :, 0], q[:, 128:, :, 0] = 30, -30
    want = kernels.mixed_attention(q, q, q)
    torch.testing.assert_close(names["sparse_attention"](q, q, q, 0.5), want)
    assert torch.equal(names["sparse_attention"](q, q, q, 1.0), want)


def test_packed_attention_by_a_plan(device, rng):
    names = {"torch": torch, "kernels": kernels}
    exec(compile(blocks("Attention, packed and planned"), "docs/backend.md", "exec"), names)
    lengths = [5, 0, 12]
    q, k, v = (torch.randn(17, heads, 16, generator=rng).to(device) for heads in (4, 2, 2))
    areas = 4.0 ** torch.randint(0, 2, (17,), generator=rng).to(device)
    got = names["packed_attention"](q, k, v, lengths, areas)
    for part in (slice(0, 5), slice(5, 17)):
        want = kernels.mixed_attention(q[None, part], k[None, part], v[None, part], key_bias=areas[None, part].log())
        torch.testing.assert_close(got[part], want[0])


def test_a_region_attends_to_kept_keys_and_values(device, rng):
    names = {"torch": torch, "kernels": kernels}
    exec(compile(blocks("A region with kept keys and values"), "docs/backend.md", "exec"), names)
    q, k, v = (torch.randn(2, 30, 2, 16, generator=rng).to(device) for _ in range(3))
    regions = [torch.tensor([4, 1, 20], device=device), torch.arange(25, 30, device=device)]
    kept = [x.clone() for x in (k, v)]
    for sample, region in enumerate(regions):
        for x in kept:
            x[sample, region] = 9.0  # stale in the region alone
    packed = [torch.cat([x[sample, region] for sample, region in enumerate(regions)]) for x in (q, k, v)]
    got = names["region_attention"](*packed, *kept, regions)
    whole = kernels.mixed_attention(q, k, v)
    torch.testing.assert_close(got, torch.cat([whole[sample, region] for sample, region in enumerate(regions)]))
    assert torch.equal(kept[0], k) and torch.equal(kept[1], v)
