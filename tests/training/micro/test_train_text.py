"""The text encoders learn what prompts say."""

import pytest
import torch
from torch import nn

from specedit.micro import scenes
from training.micro import build, families, loop, train_text
from training.micro.probes import PROMPT_CLASSES


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["kontext", "qwen"])
def test_text_encoders_learn_what_prompts_say(name, few_blocks):
    torch.manual_seed(0)
    pipe = families.family_named(name).build(0)
    modules = families.family_named(name).text_modules(pipe)
    heads = nn.ModuleList(
        nn.Linear(width, sum(PROMPT_CLASSES)) for width in families.family_named(name).probe_widths(pipe)
    )
    batch = [scenes.describe(s) for s in loop.seeds(0, 16)]
    parameters = [p.requires_grad_(True) for m in (*modules, heads) for p in m.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=8e-3)
    losses = []
    for _ in range(6):
        loss = train_text.text_loss(pipe, heads, batch, "cpu")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]
    assert all(any(p.grad is not None for p in module.parameters()) for module in modules)  # not the heads alone


@pytest.mark.thorough
def test_train_text_changes_the_text_encoders_and_nothing_else(tmp_path):
    pipe = build.kontext()
    before = {name: {k: v.clone() for k, v in getattr(pipe, name).state_dict().items()} for name in pipe.components
              if isinstance(getattr(pipe, name), nn.Module)}  # fmt: skip
    settings = loop.Settings(tmp_path, text_minutes=5.0, steps=1)
    train_text.train_text(pipe, settings, loop.Log(tmp_path / "log.json"))
    changed = {
        name for name, state in before.items()
        if any(not torch.equal(v, state[k]) for k, v in getattr(pipe, name).state_dict().items())
    }  # fmt: skip
    assert changed == {"text_encoder", "text_encoder_2"}
    assert not any(p.requires_grad for p in pipe.text_encoder.parameters())
    settings.text_minutes = 0.0
    weights = [p.clone() for p in pipe.text_encoder.parameters()]
    train_text.train_text(pipe, settings, loop.Log(tmp_path / "log.json"))
    assert all(torch.equal(a, b) for a, b in zip(weights, pipe.text_encoder.parameters(), strict=True))
