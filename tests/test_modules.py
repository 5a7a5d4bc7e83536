"""All modules of a model, found without nested generators."""

from torch import nn

from specedit.modules import modules_of


def test_every_module_is_found_once():
    shared = nn.Linear(2, 2)
    model = nn.Sequential(nn.Sequential(shared, nn.ReLU()), nn.ModuleList([shared, nn.Sequential(nn.Linear(2, 2))]))
    model.register_module("missing", None)
    found = modules_of(model)
    assert found[0] is model and len(found) == len(set(found)) and set(found) == set(model.modules())
