"""Keys of a config: what one says of itself, what it needs to have an effect, how all of them are listed."""

import copy
import functools
import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, Field
from pydantic_core import PydanticUndefined, to_jsonable_python

GIVEN = "given"  # in `only`: the other key is neither null, nor false, nor 0
_ONLY = "x-only"  # where a field carries its conditions


def key(default: Any, description: str, *, only: Mapping[str, Any] | None = None, **bounds: Any) -> Any:
    """A field of a config. only: {other key: value, tuple of values, or GIVEN}: named although one of these does not
    hold, the key would have no effect and is refused. bounds: as pydantic's Field takes them."""
    return Field(default, description=description, json_schema_extra={_ONLY: dict(only or {})}, **bounds)


def redefault(owner: "type[BaseModel]", name: str, default: Any, description: str | None = None) -> Any:
    """The key `name` of another config with another default: for a subclass that keeps its meaning."""
    field = owner.model_fields[name]
    return key(default, description or field.description or "", only=conditions(owner, name))


def conditions(cls: "type[BaseModel]", name: str) -> dict[str, Any]:
    """What has to hold for a key to have an effect: {other key: value, tuple of values, or GIVEN}."""
    extra = cls.model_fields[name].json_schema_extra
    return extra.get(_ONLY, {}) if isinstance(extra, dict) else {}  # type: ignore[return-value]


def holds(value: Any, wanted: Any) -> bool:
    """Whether a condition of `key` is met."""
    if wanted is GIVEN:
        return value is not None and value is not False and value != 0
    return value in wanted if isinstance(wanted, tuple) else value == wanted


def condition_text(name: str, wanted: Any) -> str:
    """A condition in words: '"variant" is "qdi"'."""
    if wanted is GIVEN:
        return f'"{name}" is given and not 0'
    values = wanted if isinstance(wanted, tuple) else (wanted,)
    return f'"{name}" is {" or ".join(json.dumps(value) for value in values)}'


def key_table(cls: type[BaseModel], shared: type[BaseModel]) -> list[tuple[str, str, str, str]]:
    """(key, type, default, meaning) of every key, those first that `shared` has not."""
    rows = []
    for name in sorted(cls.model_fields, key=lambda name: name in shared.model_fields):
        field = cls.model_fields[name]
        missing = field.default is PydanticUndefined and field.default_factory is None
        value = None if missing else to_jsonable_python(field.get_default(call_default_factory=True))
        needs = [condition_text(other, wanted) for other, wanted in conditions(cls, name).items()]
        meaning = (field.description or "") + (f" (only where {' and '.join(needs)})" if needs else "")
        rows.append((name, allowed(cls, name), "required" if missing else json.dumps(value), meaning))
    return rows


@functools.cache
def _schema(cls: type[BaseModel]) -> dict[str, Any]:
    return cls.model_json_schema()


def json_schema(cls: type[BaseModel], learner: str) -> dict[str, Any]:
    """JSON schema of a learner's config files, for editors."""
    schema = copy.deepcopy(_schema(cls))
    for entry in schema["properties"].values():
        entry.pop(_ONLY, None)
    schema["title"] = f"Palimpsest experiment: {learner}"
    schema["properties"]["$schema"] = {"type": "string"}
    schema["properties"]["model_name"]["const"] = learner
    return schema


def allowed(cls: type[BaseModel], key: str) -> str:
    """What a key accepts, in words: "whole number >= 1 or null"."""
    schema = _schema(cls)
    return _allowed_by(schema["properties"][key], schema.get("$defs", {}))


def _allowed_by(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rpartition("/")[2]]
        inside = [f'"{key}": {_allowed_by(value, definitions)}' for key, value in schema["properties"].items()]
        return f"object {{{', '.join(inside)}}}"
    if "anyOf" in schema:
        return " or ".join(_allowed_by(option, definitions) for option in schema["anyOf"])
    if "enum" in schema:
        return " | ".join(json.dumps(value) for value in schema["enum"])
    if "const" in schema:
        return json.dumps(schema["const"])
    if "prefixItems" in schema:
        return f"[{', '.join(_allowed_by(item, definitions) for item in schema['prefixItems'])}]"
    if schema.get("type") == "array":
        return f"list of {_allowed_by(schema.get('items', {}), definitions)}"
    names = {"integer": "whole number", "boolean": "true | false", "string": "text", "null": "null"}
    text = names.get(schema.get("type", "any"), schema.get("type", "any"))
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    for name, sign in bounds.items():
        if name in schema:
            text += f" {sign} {schema[name]:g}"
    return text + (f" like {schema['pattern']}" if "pattern" in schema else "")
