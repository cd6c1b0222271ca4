"""Methods as written on the command line, and the rows of the paper's table."""

import pytest
from torch import nn

from sdgp_cusparselt.convert import convert_
from sdgp_cusparselt.training.methods import TABLE1, Method, parse_method, parse_methods
from sdgp_cusparselt.training.tasks import TASKS


def test_spelling_is_read_back() -> None:
    for row in TABLE1:
        assert parse_method(row).spelling == row
    assert parse_method(" magnitude ") == Method("magnitude", 2, 4)
    assert parse_method("mvue@1:2") == Method("mvue", 1, 2)


def test_table1_has_the_rows_of_the_paper() -> None:
    patterns = [(m.prune, f"{m.n}:{m.m}") for m in map(parse_method, TABLE1[1:])]
    rescaled = ["1:4", "2:4", "1:8", "2:8", "4:8", "2:16", "4:16", "8:16", "4:32", "8:32", "16:32"]
    expected = [("random", "2:4"), ("magnitude", "2:4")]
    expected += [("rescaled_magnitude", pattern) for pattern in rescaled]
    assert TABLE1[0] == "dense"
    assert patterns == expected


def test_a_slower_shape_prunes_all_the_same() -> None:
    config = parse_method("magnitude").config()
    assert config is not None and config.on_slower == "prune"


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_every_row_of_table1_prunes_the_same_layers(task: object) -> None:
    converted = set()
    for row in TABLE1[1:]:
        model = task.build_model()  # type: ignore[attr-defined]
        converted.add(tuple(convert_(model, parse_method(row).config()).converted))
    (layers,) = converted
    kinds = (nn.Linear, nn.Conv2d)
    everything = [fqn for fqn, module in model.named_modules() if isinstance(module, kinds)]
    left_out = [fqn for fqn in everything if fqn not in layers]
    assert all("stem" in fqn or fqn in ("fc", "lm_head") for fqn in left_out)


@pytest.mark.parametrize(
    "text, words",
    [
        ("magnitud", "got 'magnitud'"),
        ("dense@2:4", "got 'dense@2:4'"),
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
