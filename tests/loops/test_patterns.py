"""convert_ with patterns of layer names: each layer its own config."""

import pytest
from torch import nn

import sdgp_cusparselt as sdgp


def test_patterns_give_each_layer_its_own() -> None:
    model = nn.ModuleDict(
        {name: nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 8)) for name in ("attn", "mlp", "out")}
    )
    two, one = sdgp.SDGPConfig(prune="magnitude"), sdgp.SDGPConfig(prune="magnitude", n=1)
    report = sdgp.convert_(model, {"mlp.1": None, "mlp.*": one, "attn.*": two})
    assert report.configs == {"attn.0": two, "attn.1": two, "mlp.0": one}
    assert report.converted == list(report.configs) and report.config is None
    assert report.skipped["mlp.1"] == report.skipped["out.0"] == "left dense by its name"
    assert "magnitude 1:4" in str(report)
    assert type(model["mlp"][1]) is nn.Linear and model["mlp"][0].sdgp_config is one


@pytest.mark.parametrize(
    "configs, words",
    [
        ({"a*": None}, "matched none of"),
        (
            {
                "0": sdgp.SDGPConfig(prune="magnitude"),
                "block.*": sdgp.SDGPConfig(prune="magnitude"),
            },
            "each match a layer, got 'block",
        ),
    ],
)
def test_a_pattern_that_matches_nothing_raises(configs: dict, words: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    with pytest.raises(ValueError, match=words):
        sdgp.convert_(model, configs)
    assert type(model[0]) is nn.Linear
