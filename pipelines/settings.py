"""One way to configure every job: pydantic models, filled from YAML recipes and the command line.

`python jobs/train.py --config a.yaml --config b.yaml --data.batch_size 16`: a flag beats the last recipe, which beats
the first, which beats the default. A name that no model knows is an error that names the recipe and the nearest field.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_origin

import fsspec
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict


class Section(BaseModel):
    """A part of a job's settings. Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class JobSettings(BaseSettings):
    """The settings of one job. Subclass it, give every field a docstring: `--help` shows it."""

    model_config = SettingsConfigDict(
        extra="forbid",
        use_attribute_docstrings=True,
        cli_avoid_json=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        nested_model_default_partial_update=True,
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """A list of sections is one flag, so `--help` has no line for what each of them takes: it is told there."""
        super().__pydantic_init_subclass__(**kwargs)
        for field in cls.model_fields.values():
            items = get_args(field.annotation) if get_origin(field.annotation) is list else ()
            if items and isinstance(items[0], type) and issubclass(items[0], Section):
                field.description = f"{field.description} Fields of each: {_describe(items[0])}"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Recipes come in as init arguments. The environment is no source: a run depends on what is written."""
        return (init_settings,)


Settings = TypeVar("Settings", bound=JobSettings)


def load_settings(settings_class: type[Settings], argv: list[str] | None = None, prog: str | None = None) -> Settings:
    """Read `--config` recipes and flags into `settings_class`.

    Exits with status 2 and a line per mistake where a recipe is missing, no YAML mapping, or names what is unknown.
    """
    arguments = sys.argv[1:] if argv is None else argv
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", action="append", default=[])
    known, flags = finder.parse_known_args(arguments)
    recipes = {path: _read_recipe(path) for path in known.config}
    merged: dict[str, Any] = {}
    for recipe in recipes.values():
        merged = _merge(merged, recipe)
    try:
        flags_source: dict[str, Any] = {"_cli_parse_args": flags, "_cli_prog_name": _usage(prog)}
        return settings_class(**flags_source, **merged)
    except ValidationError as error:
        _refuse([_explain(settings_class, problem, recipes) for problem in error.errors()])


def dump_settings(settings: BaseModel) -> str:
    """The resolved settings as YAML, to be stored beside what they produced."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)


def _describe(section: type[Section]) -> str:
    """The fields of a section, each with the first sentence of what is said of it."""
    told = []
    for name, field in section.model_fields.items():
        first = " ".join((field.description or "").split()).split(". ")[0].split("; ")[0].rstrip(".")
        told.append(f"{name} ({'required' if field.is_required() else f'default: {field.default!r}'}): {first}")
    return "; ".join(told) + "."


def _usage(prog: str | None) -> str:
    return f"{prog or Path(sys.argv[0]).name} [--config RECIPE.yaml ...]"


class _RecipeLoader(yaml.SafeLoader):
    """YAML in which a name stands once: plain PyYAML takes the last of two, and a whole list of sources is lost."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        names: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in names:
                raise yaml.composer.ComposerError(None, None, f"{key.value!r} stands twice", key.start_mark)
            names.add(key.value)
        return node


def _read_recipe(path: str) -> dict[str, Any]:
    try:
        with fsspec.open(path, "r", encoding="utf-8") as file:
            recipe = yaml.load(file, _RecipeLoader)
    except (OSError, UnicodeDecodeError) as error:
        _refuse([f"{path}: this recipe cannot be read ({error})"])
    except yaml.YAMLError as error:
        _refuse([f"{path}: this recipe is no valid YAML: {error}"])
    if recipe is not None and not isinstance(recipe, dict):
        _refuse([f"{path}: a recipe is a mapping of fields, this file holds a {type(recipe).__name__}"])
    return recipe or {}


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _explain(settings_class: type[BaseModel], problem: Any, recipes: dict[str, dict[str, Any]]) -> str:
    where = [str(part) for part in problem["loc"]]
    field = ".".join(where)
    origin = _origin(recipes, where)
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(where[-1], _siblings(settings_class, where), n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        return f"{origin}: unknown field '{field}'{hint}"
    if problem["type"] == "missing":
        if any(part.isdigit() for part in where):  # there is no flag for a field of an item of a list
            return f"{_origin(recipes, where[:-1])}: '{field}' is required"
        return f"'{field}' is required: give it in a recipe or as --{field}"
    return f"{origin}: {field or 'settings'}: {problem['msg']} (got {problem['input']!r})"


def _origin(recipes: dict[str, dict[str, Any]], where: list[str]) -> str:
    """The recipe that has the field at `where`; the last one counts."""
    return next((path for path, recipe in reversed(recipes.items()) if _contains(recipe, where)), "command line")


def _contains(recipe: Any, where: list[str]) -> bool:
    for part in where:
        if isinstance(recipe, list):
            recipe = dict(zip(map(str, range(len(recipe))), recipe, strict=True))
        if not isinstance(recipe, dict) or part not in recipe:
            return False
        recipe = recipe[part]
    return True


def _siblings(settings_class: Any, where: list[str]) -> list[str]:
    for part in where[:-1]:
        if part.isdigit():  # an item of a list, whose sections are known from the list's own name
            continue
        field = getattr(settings_class, "model_fields", {}).get(part)
        candidates = getattr(field.annotation, "__args__", (field.annotation,)) if field else ()
        settings_class = next((c for c in candidates if hasattr(c, "model_fields")), None)
    return list(getattr(settings_class, "model_fields", {}))


def _refuse(messages: list[str]) -> NoReturn:
    for message in messages:
        print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)
