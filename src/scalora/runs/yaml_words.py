"""YAML as people mean it: 1e-3 is a number, and a label is the word that was written."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml

_STR, _INT, _BOOL, _NULL, _MERGE = (f"tag:yaml.org,2002:{name}" for name in ("str", "int", "bool", "null", "merge"))
_LISTS = (("task", "labels"), ("task", "choices"), ("task", "data", "values"))
"""Where lists hold labels and other texts of the data."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes 1e-3 for a text; people do not."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def load_yaml(text: str, within: Sequence[str] = ()) -> Any:
    """A recipe's content, or the value under its keys `within`.

    YAML 1.1 takes yes, no, on and off for booleans, 012 for ten, 12:30 for 750, and days for dates. Under `task`, where
    words of the data stand, the first four stay words; in its lists of labels, choices and values everything is as it
    was written, but for plain integers.

    Raises:
        yaml.YAMLError: the text is not valid YAML, a mapping has a key twice, or a text has half a character.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_keys(node, set())
        _check_texts(node, set())
        _keep_words(loader, node, tuple(within))
        return loader.construct_document(node)
    except RecursionError as error:
        raise yaml.YAMLError("its parts lie too deep in each other") from error
    finally:
        loader.dispose()


def load_written(text: str) -> Any:
    """The content of a recipe as a run wrote it, in plain YAML; raises yaml.YAMLError as :func:`load_yaml`."""
    _check_keys(yaml.compose(text, Loader=yaml.SafeLoader), set())
    return yaml.safe_load(text)


def _check_keys(node: yaml.Node | None, seen: set[int]) -> None:
    """Refuse a key that a mapping has twice: YAML would drop the first. What is merged (<<) may be overridden."""
    if id(node) in seen or not isinstance(node, yaml.CollectionNode):
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_keys(item, seen)
        return
    keys: dict[tuple[str, str], yaml.Node] = {}
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE:
            first = keys.setdefault((key.tag, key.value), key)
            if first is not key:
                raise yaml.YAMLError(
                    f"the key {key.value!r} of line {first.start_mark.line + 1} is there again in line "
                    f"{key.start_mark.line + 1}, and only one would count: remove the other"
                )
        _check_keys(key, seen)
        _check_keys(value, seen)


def _check_texts(node: yaml.Node, seen: set[int]) -> None:
    """Refuse what an escape like \\ud83d alone makes: no file can hold it, the run's own recipe included."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.ScalarNode):
        if any("\ud800" <= letter <= "\udfff" for letter in node.value):
            raise yaml.YAMLError(
                f"the text {node.value!r:.80} of line {node.start_mark.line + 1} holds half a character (a lone "
                "surrogate): write the character itself"
            )
    elif isinstance(node, yaml.CollectionNode):
        for part in node.value:
            for each in part if isinstance(part, tuple) else (part,):
                _check_texts(each, seen)


def _keep_words(loader: _Loader, node: yaml.Node, place: tuple[str, ...]) -> None:
    if place and place[0] != "task":
        return
    if isinstance(node, yaml.MappingNode):
        loader.flatten_mapping(node)
        for key, value in node.value:
            _keep_words(loader, key, place)
            _keep_words(loader, value, (*place, str(key.value)))
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _keep_words(loader, item, (*place, ""))
    elif isinstance(node, yaml.ScalarNode) and place and node.style is None and _is_word(node, place):
        node.tag = _STR


def _is_word(node: yaml.ScalarNode, place: tuple[str, ...]) -> bool:
    if place[-1] or not any(place[: len(each)] == each for each in _LISTS):
        return node.tag == _BOOL and node.value.lower() not in ("true", "false")
    integer = node.tag == _INT and re.fullmatch(r"0|-?[1-9]\d*", node.value)
    nothing = node.tag == _NULL and not node.value
    return not integer and not nothing
