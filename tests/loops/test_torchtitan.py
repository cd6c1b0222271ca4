"""torchtitan's own small Llama, built with pruned layers, on the CPU."""

import pytest
import torch

import sdgp_cusparselt as sdgp

pytest.importorskip("torchtitan", reason="torchtitan is not installed")


def test_the_converter_builds_pruned_layers_and_follows_the_optimizers() -> None:
    from torchtitan.models.llama3 import model_registry

    from sdgp_cusparselt.integrations.torchtitan import SDGPConverter, follow

    config = sdgp.SDGPConfig(backend="dense", schedule=sdgp.Schedule(warmup=1))
    plain = model_registry("debugmodel").model.build()
    spec = model_registry("debugmodel", converters=[SDGPConverter.Config(config=config)])
    model = spec.model.build()
    layers = [mod for mod in model.modules() if isinstance(mod, sdgp.nn.SDGPModule)]
    linears = [mod for mod in plain.modules() if isinstance(mod, torch.nn.Linear)]
    assert len(layers) == len(linears) - 1, "all but the head"
    keys = [key for key in model.state_dict() if "sdgp_schedule" not in key]
    assert keys == list(plain.state_dict())
    model.verify_module_protocol()
    x = torch.randn(4, layers[0].in_features, requires_grad=True)
    follow(spec)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    spec.post_optimizer_build_fn(optimizer, [model], None)
    optimizer.step()
    assert sdgp.schedule_state(model) == {"step": 1}
    layers[0](x).sum().backward()
    assert layers[0].sdgp_record.calls, "pruned after the warm-up"
