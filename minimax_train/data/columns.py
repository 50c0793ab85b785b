"""The text of a row that has several columns: one of them, one nested in another, or a template filled from several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any

from minimax_train.errors import ConfigError

_JSON_NAMES: dict[type, str] = {
    dict: "an object",
    list: "a list",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


class NoText(ValueError):
    """A row that has no such column, or holds something other than text in it: the message says which."""


@dataclass(frozen=True)
class TextColumns:
    """Where a row's text is.

    Attributes:
        field: the configuration field that says so, with its value, for messages.
        names: the columns that are read; dots lead into nested ones.
        literals: the text before, between and behind the columns: one more than there are names.
    """

    field: str
    names: Sequence[str]
    literals: Sequence[str]

    @classmethod
    def of(cls, path: str, column: str, template: str | None) -> TextColumns:
        """The columns of ``{path}.text_column``, or of ``{path}.template`` where it is given.

        Raises:
            ConfigError: when the template cannot be filled.
        """
        if template is None:
            return cls(f"{path}.text_column={column!r}", [column], ["", ""])
        field = f"{path}.template={template!r}"
        names, literals = [], [""]
        try:
            for literal, name, form, conversion in Formatter().parse(template.replace("\\n", "\n")):
                literals[-1] += literal
                if name is not None:
                    if not name or form or conversion:
                        raise ValueError("a column's name alone belongs between braces")
                    names.append(name)
                    literals.append("")
            if not names:
                raise ValueError("it names no column")
        except ValueError as error:
            raise ConfigError(
                f"{field}: {error}; must be text with columns in braces, such as {{title}}\\n\\n{{body.text}}; "
                "braces that stand for themselves are doubled"
            ) from error
        return cls(field, names, literals)

    def text(self, row: Any) -> str | None:
        """The text of a row of JSON; None where all its columns are null or empty.

        Raises:
            NoText: naming the column; or the row is no object.
        """
        if not isinstance(row, dict):
            raise NoText(f"must be one JSON object, not {_JSON_NAMES[type(row)]}")
        return self.fill([self._value(row, name) for name in self.names])

    def fill(self, values: Sequence[Any]) -> str | None:
        """The text with these values of the columns, which are text or null.

        Raises:
            NoText: naming the column.
        """
        for name, value in zip(self.names, values, strict=True):
            if value is not None and not isinstance(value, str):
                raise NoText(f"{self.of_column(name)} holds {_JSON_NAMES[type(value)]}, must hold text")
        if len(values) == 1 and self.literals[0] == self.literals[1] == "":
            return values[0]
        if not any(values):
            return None
        return self.literals[0] + "".join((v or "") + after for v, after in zip(values, self.literals[1:], strict=True))

    def of_column(self, name: str) -> str:
        """The field, and where it names several columns, this one of them."""
        return self.field if len(self.names) == 1 else f"{self.field}: {name!r}"

    def _value(self, row: Mapping[str, Any], name: str) -> Any:
        try:
            return _nested(row, name)
        except KeyError:
            shown = ", ".join(list(row)[:20])
            raise NoText(f"has no {self.of_column(name)}; columns are {shown or 'none'}") from None


def _nested(row: Mapping[str, Any], name: str) -> Any:
    """A column of exactly that name, or what dots lead to; null where an object on the way is null."""
    if name in row:
        return row[name]
    outer, dot, inner = name.partition(".")
    found = row[outer]
    if not dot:
        raise KeyError(name)
    if found is None:
        return None
    if not isinstance(found, dict):
        raise KeyError(name)
    return _nested(found, inner)
