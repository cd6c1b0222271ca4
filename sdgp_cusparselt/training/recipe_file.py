"""Tasks in TOML files: those that ship with the package, and the user's own."""

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from sdgp_cusparselt.errors import value_error
from sdgp_cusparselt.extras import require
from sdgp_cusparselt.training.data import Dataset
from sdgp_cusparselt.training.recipe import Recipe
from sdgp_cusparselt.training.recipe_tables import (
    METRICS,
    MODELS,
    READERS,
    REQUIRED,
    TASK,
    Fields,
    Model,
    Reader,
    choice,
)
from sdgp_cusparselt.training.tasks import TASKS, Task, get_task

SHIPPED = Path(__file__).parent / "recipes"
TABLES = ("task", "data", "model", "recipe")

Choice = TypeVar("Choice", Reader, Model)


def shipped_recipes() -> list[str]:
    """Return the names of the recipes that ship with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.toml"))


def is_task(word: str) -> bool:
    """Whether ``open_task`` knows what ``word`` names: a task, a shipped recipe or a TOML file."""
    return word in TASKS or word in shipped_recipes() or word.endswith(".toml")


def open_task(word: str, data: Path | None = None) -> Task:
    """Return the task that ``sdgp train`` was asked for.

    Args:
        word: name of a built-in task or a shipped recipe, or path of a TOML file.
        data: folder of the user's data; only for recipes that read one.

    Raises:
        ValueError: there is no such task, its file is wrong, or ``data`` is missing or too much.
    """
    if word in TASKS:
        if data is not None:
            rule, fix = f"left out for {word}", "Its data ship with a package."
            raise value_error("train", "--data", rule, data, fix)
        return get_task(word)
    return load_recipe(SHIPPED / f"{word}.toml" if word in shipped_recipes() else Path(word), data)


def load_recipe(path: Path, data: Path | None = None) -> Task:
    """Read a task from the tables [task], [data], [model] and [recipe] of a TOML file.

    Args:
        path: of the file.
        data: folder of the user's data; only for readers that read one.

    Returns:
        The task; its data are read when ``load`` is called.

    Raises:
        ValueError: the file, a table or a value is not as it must be; the message names it.
        OSError: the file cannot be read.
    """
    content = _parse(path)
    task = _fields(path, "task", content["task"], TASK)
    reader, read_options = _named(path, "data", "reader", content["data"], READERS)
    model, model_options = _named(path, "model", "name", content["model"], MODELS)
    _check_fit(path, reader, read_options, model, model_options)
    folder = _check_folder(path, reader, data)

    def load() -> Dataset:
        dataset, num_classes = reader.load(read_options, folder)
        if num_classes not in (None, model_options.get("num_classes")):
            got = model_options["num_classes"]
            rule = f"{num_classes}, the classes in the data"
            raise _wrong(path, "[model] num_classes", rule, got, "Change it in the file.")
        return dataset

    def build_model() -> nn.Module:
        return model.build(**model_options)

    described = json.dumps({"name": content["model"]["name"], **model_options}, sort_keys=True)
    return Task(
        name=task["name"],
        summary=task["summary"],
        load=load,
        build_model=build_model,
        metric=METRICS[task["metric"]],
        recipe=_recipe(path, content["recipe"]),
        evaluations=task["evaluations"],
        model=described,
    )


def _parse(path: Path) -> dict[str, dict[str, Any]]:
    # The standard library has the same parser from Python 3.11 on.
    name = "tomllib" if sys.version_info >= (3, 11) else "tomli"
    toml = require(name, package="tomli", purpose="a recipe file")
    try:
        content: dict[str, Any] = toml.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError are such
        fix = "Correct the file."
        raise value_error("load_recipe", str(path), "a TOML file", str(error), fix) from error
    rule = f"the four tables {', '.join(TABLES)}"
    fix = "Start from a recipe that ships with the package."
    if set(content) != set(TABLES):
        raise _wrong(path, "its content", rule, ", ".join(content) or "none", fix)
    for table in TABLES:
        if not isinstance(content[table], dict):
            raise _wrong(path, f"[{table}]", "a table", repr(content[table]), fix)
    return content


def _fields(path: Path, table: str, given: Mapping[str, Any], fields: Fields) -> dict[str, Any]:
    """Return the table with defaults filled in; keys are known and values as they must be."""
    _check_keys(path, table, given, list(fields))
    values = {}
    for key, field in fields.items():
        if key not in given and field.default is not REQUIRED:
            values[key] = field.default
        elif key not in given or not field.accepts(given[key]):
            got = repr(given[key]) if key in given else "nothing"
            raise _wrong(path, f"[{table}] {key}", field.rule, got, "Set it in the file.")
        else:
            values[key] = given[key]
    return values


def _named(
    path: Path, table: str, key: str, given: Mapping[str, Any], choices: Mapping[str, Choice]
) -> tuple[Choice, dict[str, Any]]:
    """Return the reader or model that ``key`` names, and its options."""
    named = {name: value for name, value in given.items() if name == key}
    name = _fields(path, table, named, {key: choice(*choices)})[key]
    options = {other: value for other, value in given.items() if other != key}
    return choices[name], _fields(path, table, options, choices[name].fields)


def _check_keys(path: Path, table: str, given: Mapping[str, Any], known: list[str]) -> None:
    unknown = [key for key in given if key not in known]
    if unknown:
        rule = f"among {', '.join(known)}" if known else "left out"
        fix = "Remove or correct it."
        raise _wrong(path, f"[{table}] {unknown[0]}", rule, "an unknown key", fix)


def _check_fit(
    path: Path,
    reader: Reader,
    read_options: Mapping[str, Any],
    model: Model,
    model_options: Mapping[str, Any],
) -> None:
    if reader.kind != model.kind:
        fix = "Choose another reader or model."
        raise _wrong(path, "[model] name", f"a model of {reader.kind}", f"one of {model.kind}", fix)
    if model.kind == "text" and model_options["context"] < read_options["context"]:
        rule, got = f"at least the {read_options['context']} of [data]", model_options["context"]
        raise _wrong(path, "[model] context", rule, got, "Change one of them.")
    stages = model_options.get("widths"), model_options.get("depths")
    if None not in stages and len(stages[0] or ()) != len(stages[1] or ()):
        rule, got = "as many as [model] widths", repr(stages[1])
        raise _wrong(path, "[model] depths", rule, got, "Give each stage both.")
    first, last = read_options.get("image_size"), read_options.get("final_image_size")
    if first is not None and last is not None and last < first:
        rule = f"at least image_size = {first}"
        raise _wrong(path, "[data] final_image_size", rule, last, "Sizes grow.")
    if (last is None) != (read_options.get("ramp") is None):
        rule, got = "given together with [data] final_image_size", "one of the two"
        raise _wrong(path, "[data] ramp", rule, got, "Set both, or remove both.")


def _check_folder(path: Path, reader: Reader, data: Path | None) -> Path:
    if reader.folder and (data is None or not data.is_dir()):
        rule, got = f"{reader.folder} for {path.name}", "nothing" if data is None else data
        raise value_error("train", "--data", rule, got, "Pass the folder of your data.")
    if not reader.folder and data is not None:
        rule, fix = f"left out for {path.name}", "Its data ship with a package."
        raise value_error("train", "--data", rule, data, fix)
    return Path() if data is None else data


def _recipe(path: Path, given: Mapping[str, Any]) -> Recipe:
    _check_keys(path, "recipe", given, [field.name for field in dataclasses.fields(Recipe)])
    try:
        return Recipe(**given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"load_recipe: {path}: [recipe]: {error}") from error


def _wrong(path: Path, what: str, rule: str, got: object, fix: str) -> ValueError:
    return value_error("load_recipe", f"{path}: {what}", rule, got, fix)
