"""YAML of users' files: plain data only, every key once."""

from __future__ import annotations

from typing import Any

import yaml

from bitwright.core.errors import InputError


def parse_yaml(text: str, where: str) -> Any:
    """The data in a YAML text; `where` names it in errors. Raises InputError for malformed text and repeated keys."""
    try:
        return yaml.load(text, _UniqueKeys)
    except RecursionError:
        raise InputError(f"{where} is nested too deeply to read.") from None
    except yaml.YAMLError as error:
        raise InputError(f"{where} is not valid YAML: {_explain_yaml(error)}") from None


class _UniqueKeys(yaml.SafeLoader):
    """YAML lets a key appear twice and takes the last; in a description that is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(
                        "", node.start_mark, f"the key {key.value!r} appears twice", key.start_mark
                    )
                seen.add(key.value)
        made: dict[Any, Any] = super().construct_mapping(node, deep)
        for key in made:
            if not isinstance(key, str):
                raise yaml.MarkedYAMLError("", node.start_mark, f"the key {key!r} is not text", node.start_mark)
        return made


def _explain_yaml(error: yaml.YAMLError) -> str:
    """One line: what is wrong, and where."""
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return where + str(getattr(error, "problem", None) or error).replace("\n", " ")
