"""What the fields of the configuration's dataclasses take.

A field's annotation says it all: its type, of every number the least and the greatest accepted, and which strings are
paths. Text, from the command line or a YAML file, gets its type here and nowhere else::

    @dataclass
    class RecipeConfig:
        steps: Annotated[int, Range(1, 10**9)]
        gradient_clip: Annotated[float | None, Range(1e-6, 1e6, null="no limit")] = 1.0
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import types
import unicodedata
from contextlib import suppress
from dataclasses import dataclass, is_dataclass
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from minimax_train.errors import ConfigError, require

# What stands for "no value", on the command line and in files; a quoted one is a string.
NULLS = ("null", "Null", "NULL")
# Marks strings that name files or folders: a leading ``~`` is the home folder.
PATH = "path"
_WORDS = {**dict.fromkeys(("true", "yes", "on"), True), **dict.fromkeys(("false", "no", "off"), False)}
_QUOTED = r"""'(?:\\'|[^'])*'|"(?:\\"|[^"])*\""""
_NAME = re.compile(r"[^\W\d][\w-]*", re.ASCII)
_ELEMENT = re.compile(rf"\s*(?P<element>{_QUOTED}|[^,]*?)\s*(?P<end>,|\Z)", re.DOTALL)
_UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")  # categories of Unicode: controls, lone surrogates, line and paragraph breaks


@dataclass(frozen=True)
class Range:
    """The least and the greatest value of a number; both are accepted.

    Attributes:
        null: what null stands for, where the field takes it.
    """

    least: float
    greatest: float
    null: str = ""

    def __str__(self) -> str:
        least, greatest = (f"{bound:g}" if isinstance(bound, float) else bound for bound in (self.least, self.greatest))
        return f"must be between {least} and {greatest}{self.null and f', or null for {self.null}'}"


@dataclass(frozen=True)
class Field:
    """What one field takes.

    Attributes:
        kind: ``int``, ``float``, ``bool``, ``str``, ``list`` (of strings), ``dict`` (from names) or a dataclass.
        optional: whether null is accepted.
        range: of a number.
        is_path: whether its strings are paths.
        default: what it is without a value; ``dataclasses.MISSING`` if it needs one.
        element: what the values of a dict are.
    """

    kind: type
    optional: bool
    range: Range | None
    is_path: bool
    default: Any
    element: Field | None = None

    @property
    def accepted(self) -> str:
        """The type in a word or two, for messages."""
        if self.element is not None:
            return "names, each with keys of its own" if is_dataclass(self.element.kind) else "names, each with a value"
        return ("list[str]" if self.kind is list else self.kind.__name__) + (" or null" if self.optional else "")


@functools.cache
def fields_of(group: type) -> dict[str, Field]:
    """The fields of a dataclass by name."""
    hints = get_type_hints(group, include_extras=True)
    return {field.name: _field(hints[field.name], field) for field in dataclasses.fields(group)}


def _field(hint: Any, field: dataclasses.Field | None) -> Field:
    hint, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    (option,) = (option for option in options if option is not type(None))
    kind, default = get_origin(option) or option, dataclasses.MISSING
    if field is not None:
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if kind is dict:
        _, value = get_args(option)
        element = _field(Annotated[value, *marks] if marks else value, None)
        return Field(kind, type(None) in options, None, False, default, element)
    ranges = [mark for mark in marks if isinstance(mark, Range)]
    assert len(ranges) == (kind in (int, float)), f"{hint}: every number needs a range, and nothing else has one"
    return Field(kind, type(None) in options, ranges[0] if ranges else None, PATH in marks, default)


def check_fields(group: str, config: object) -> None:
    """Refuse values of another type, numbers out of range, and strings that cannot be what was meant.

    Expands ``~`` in paths, and makes floats of integers where the field is one. Every dataclass of the configuration
    calls it first in its ``__post_init__``.

    Raises:
        ConfigError: naming the key, its value and what is accepted.
    """
    for name, field in fields_of(type(config)).items():
        setattr(config, name, _checked(f"{group}.{name}".lstrip("."), getattr(config, name), field))


def _checked(key: str, value: Any, field: Field) -> Any:
    if value is None:
        require(field.optional, key, value, f"is not Optional (accepted: {field.accepted})")
        return None
    if field.element is not None:
        require(isinstance(value, dict), key, value, f"must be a group of {field.accepted}")
        for name in value:
            require(_NAME.fullmatch(str(name)) is not None, key, name, "names are of letters, digits, '_' and '-'")
        return {name: _checked(f"{key}.{name}", element, field.element) for name, element in value.items()}
    if is_dataclass(field.kind):  # which checks itself
        return value
    fits = isinstance(value, (int, float) if field.kind is float else field.kind)
    fits &= field.kind is bool or not isinstance(value, bool)  # which Python counts among the integers
    require(fits, key, value, f"is of another type (accepted: {field.accepted})")
    if field.range is not None:
        # NaN compares false with everything.
        require(field.range.least <= value <= field.range.greatest, key, value, str(field.range))
        return field.kind(value)
    if field.kind is list:
        return [_checked(key, element, dataclasses.replace(field, kind=str)) for element in value]
    return _checked_string(key, value, field) if field.kind is str else value


def _checked_string(key: str, value: str, field: Field) -> str:
    require(value != "", key, value, f"must not be empty{'; null for none' if field.optional else ''}")
    require(value == value.strip(), key, value, "must not begin or end with white space")
    printable = not any(unicodedata.category(letter) in _UNPRINTABLE for letter in value)
    require(printable, key, value, "must not contain line breaks, control characters or bytes that are no text")
    require("${" not in value, key, value, "must not contain '${' once references to other keys are filled in")
    if not (field.is_path and value.startswith("~")):
        return value
    expanded = os.path.expanduser(value)
    home = value.split("/")[0]
    require(expanded != value, key, value, f"there is no home folder {home}; write ./{value} for a name that begins so")
    return expanded


def from_text(key: str, given: Any, field: Field) -> Any:
    """The value that a field gets from what was typed for it.

    Args:
        key: dotted, for messages.
        given: text, None for null, or a list of these.

    Raises:
        ConfigError: for text that is no value of the field's type.
    """

    def refuse(problem: str) -> ConfigError:
        return ConfigError(f"{key}={show(given)}: {problem} (accepted: {field.accepted})")

    if given is None:
        if field.optional:
            return None
        raise refuse("is not Optional")
    if field.kind is list:
        elements = split_list(given) if isinstance(given, str) else given
        if not isinstance(elements, list):
            raise refuse("must be a list in brackets, [a,b]")
        if not all(isinstance(element, str) and not _is_list(element) for element in elements):
            raise refuse("must be a list of strings")
        return elements
    if field.element is not None:
        if not isinstance(given, dict):
            raise refuse(f"is a group of names: set one as in {key}.NAME=...")
        return {name: from_text(f"{key}.{name}", value, field.element) for name, value in given.items()}
    if isinstance(given, (dict, list)):
        raise refuse("must be one value")
    text = str(given)
    if field.kind is str:
        return text
    if field.kind is bool:
        if text.lower() not in _WORDS:
            raise refuse("must be true or false")
        return _WORDS[text.lower()]
    with suppress(ValueError):
        if text.isascii() and "_" not in text:  # Python takes 1_0 for 10
            return field.kind(text)
    if "," in text:
        raise refuse("must be one value: there are no sweeps over several")
    raise refuse("must be an integer in digits" if field.kind is int else "must be a number")


def unquote(text: str) -> str | None:
    """A value of the command line as it was meant: without the quotes around all of it; None for a null without."""
    if text in NULLS:
        return None
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1].replace("\\" + text[0], text[0])
    return text


def split_list(text: str) -> list[str | None] | None:
    """The elements of ``[a, 'b,c']``, each as typed or, in quotes, without these; None if it is no list."""
    if not _is_list(text):
        return None
    inside, at, elements = text[1:-1], 0, []
    if not inside.strip():
        return []
    while True:
        match = _ELEMENT.match(inside, at)
        assert match is not None  # an element may be anything, and nothing
        elements.append(unquote(match["element"]))
        if not match["end"]:
            return elements
        at = match.end()


def show(given: Any) -> str:
    """What was typed, as a person would type it."""
    if given is None:
        return "null"
    if isinstance(given, list):
        return f"[{', '.join(map(show, given))}]"
    if isinstance(given, dict):
        return f"{{{', '.join(f'{key}: {show(value)}' for key, value in given.items())}}}"
    return str(given) if str(given).isprintable() else repr(given)  # all of it on one line


def _is_list(text: str) -> bool:
    return text.startswith("[") and text.endswith("]")
