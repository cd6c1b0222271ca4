"""Methods as written on the command line, and the rows of the paper's table."""

import pytest
from torch import nn

from sdgp_cusparselt.layers.convert import convert_
from sdgp_cusparselt.training.methods import (
    GRADIENT_BIAS,
    PRESETS,
    TABLE1,
    Method,
    parse_method,
    parse_methods,
)
from sdgp_cusparselt.training.tasks import TASKS


def test_spelling_is_read_back() -> None:
    for row in (*TABLE1, *GRADIENT_BIAS, *PRESETS, "magnitude@1:4+grad_weight=random"):
        assert parse_method(row).spelling == row
    assert parse_method(" magnitude ") == Method("magnitude", 2, 4)
    assert parse_method("mvue@1:2") == Method("mvue", 1, 2)
    assert parse_method("none+grad_weight=mvue") == Method("none", 2, 4, "mvue")
    phases = "readers:mvue@2:4+heavy=0.06+warmup=0.2+tail=0.1+grad_weight=mvue"
    assert parse_method(phases).spelling == phases


def test_labels_and_slugs() -> None:
    both = Method("magnitude", 2, 4, "mvue")
    assert both.label == "magnitude 2:4, grad_weight: mvue 2:4"
    assert both.slug == "magnitude-2of4+grad_weight-mvue"
    assert Method("none", 2, 4, "mvue").label == "grad_weight: mvue 2:4"
    assert Method("none").label == "none 2:4"
    assert Method("rescaled_magnitude", 1, 4).slug == "rescaled_magnitude-1of4"
    readers = parse_method("readers:mvue")
    assert readers == Method("mvue", preset="readers")
    assert (readers.label, readers.slug) == ("readers: mvue 2:4", "readers-mvue-2of4")


def test_shares_of_the_steps_that_are_dense() -> None:
    method = parse_method("mvue+warmup=0.2+tail=.1")
    assert method == Method("mvue", warmup=0.2, tail=0.1)
    assert method.label == "mvue 2:4, first 0.2 dense, last 0.1 dense"
    assert method.slug == "mvue-2of4+warmup-0.2+tail-0.1"
    assert method.pruned_share == pytest.approx(0.7)
    config = method.config(total_steps=50)
    assert config is not None and config.schedule is not None
    stages = [config.schedule.stage(step, config.prune, 2, 4).prune for step in range(50)]
    assert stages == ["none"] * 10 + ["mvue"] * 35 + ["none"] * 5


def test_gradient_bias_compares_four_methods_for_each_product() -> None:
    methods = [parse_method(row) for row in GRADIENT_BIAS]
    compared = ["magnitude", "rescaled_magnitude", "mvue", "random"]
    assert [m.prune for m in methods[1:5]] == [m.grad_weight for m in methods[5:]] == compared
    configs = [m.config() for m in methods]
    assert configs[0] is None and not methods[0].prunes_grad_input
    for method, config in zip(methods[1:], configs[1:], strict=True):
        assert config is not None and config.prunes == method.prunes_grad_input
        assert (config.grad_weight == "sparse") == (method.grad_weight is not None)
        if method.grad_weight is not None:
            assert config.grad_weight_prune == method.grad_weight and not config.prunes


def test_table1_has_the_rows_of_the_paper() -> None:
    patterns = [(m.prune, f"{m.n}:{m.m}") for m in map(parse_method, TABLE1[1:])]
    rescaled = ["1:4", "2:4", "1:8", "2:8", "4:8", "2:16", "4:16", "8:16", "4:32", "8:32", "16:32"]
    expected = [("random", "2:4"), ("magnitude", "2:4")]
    expected += [("rescaled_magnitude", pattern) for pattern in rescaled]
    assert TABLE1[0] == "dense"
    assert patterns == expected


def test_a_slower_shape_prunes_all_the_same() -> None:
    config = parse_method("magnitude").config()
    assert config is not None
    assert (config.on_unsupported, config.on_slower) == ("emulate", "emulate")


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_every_row_of_table1_prunes_the_same_layers(task: object) -> None:
    converted = set()
    for row in TABLE1[1:]:
        model = task.build_model()  # type: ignore[attr-defined]
        method = parse_method(row)
        report = convert_(model, method.config(), preset=method.preset)
        converted.add(tuple(report.converted))
    (layers,) = converted
    kinds = (nn.Linear, nn.Conv2d)
    everything = [fqn for fqn, module in model.named_modules() if isinstance(module, kinds)]
    left_out = [fqn for fqn in everything if fqn not in layers]
    outer = ("patch_embedding", "fc", "head", "lm_head")
    assert all("stem" in fqn or fqn in outer for fqn in left_out)


@pytest.mark.parametrize(
    "text, words",
    [
        ("magnitud", "got 'magnitud'"),
        ("dense@2:4", "got 'dense@2:4'"),
        ("dense+grad_weight=mvue", "got 'dense+grad_weight=mvue'"),
        ("none+grad_weight=dense", "got 'none+grad_weight=dense'"),
        ("magnitude@2:8+grad_weight=mvue", "grad_weight must be"),
        ("dense+warmup=0.2", "got 'dense+warmup=0.2'"),
        ("mvue+warmup=2", "got 'mvue+warmup=2'"),
        ("mvue+warmup=0.6+tail=0.4", "warmup, tail and settle must be below total_steps"),
        ("magnitude@2", "got 'magnitude@2'"),
        ("magnitude@-1:4", "got 'magnitude@-1:4'"),
        ("magnitude@5:4", "n must be"),
        ("magnitude@0:4", "n must be"),
        ("magnitude@1:64", "m must be"),
        ("", "a list of different methods, got ''"),
        ("dense,dense", "a list of different methods"),
        ("magnitude,magnitude@2:4", "a list of different methods"),
    ],
)
def test_bad_spellings_are_named(text: str, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_methods(text)
    assert words in str(caught.value)
