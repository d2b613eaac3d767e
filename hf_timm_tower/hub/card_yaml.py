"""The metadata of a model card as text: comments, order and spelling of what does not change stay."""

from collections.abc import Mapping
from typing import Any

# The parser that ModelCard itself reads metadata with; core imports nothing beside its five libraries.
from huggingface_hub.repocard import yaml, yaml_dump  # type: ignore[attr-defined]

from ..reader.errors import FormatError


def read_yaml(source: str) -> Any:
    """What a YAML text says.

    Raises:
        FormatError: it is not YAML; the message says only what is wrong.
    """
    try:
        return yaml.safe_load(source)
    except yaml.YAMLError as error:
        raise FormatError(f"is not YAML ({' '.join(str(error).split())})") from error
    except (ValueError, RecursionError) as error:  # dates that do not exist, nesting without end
        raise FormatError(f"cannot be read ({error})") from error


def edit_yaml(source: str, old: Mapping[str, Any], new: Mapping[str, Any], newline: str) -> str:
    """Metadata as text, changed.

    Args:
        source: YAML of a mapping.
        old: What it says.
        new: What it shall say.
        newline: The line end of what is added.
    """
    if old == new:
        return source
    edited = _edit_lines(source, old, new, newline)
    try:
        if edited is not None and read_yaml(edited) == new:
            return edited
    except FormatError:
        pass  # a change took an anchor away
    return _dump(dict(new), newline)  # anchors, or the whole in one {...}: what it says stays, its spelling does not


def _edit_lines(source: str, old: Mapping[str, Any], new: Mapping[str, Any], newline: str) -> str | None:
    node = yaml.compose(source, Loader=yaml.SafeLoader)
    lines = source.splitlines(keepends=True)
    if node is not None:
        if node.flow_style:
            return None
        for key, value in reversed(node.value):
            name = key.value
            first, last = key.start_mark.line, _last_line(value)
            if last < first or (name in new and name in old and new[name] == old[name]):
                continue
            if name in new and _is_longer(value, old[name], new[name]):
                indent = " " * value.start_mark.column
                items = _dump(new[name][len(old[name]) :], newline).split(newline)
                lines[last] = lines[last].rstrip("\r\n") + newline
                lines[last + 1 : last + 1] = [indent + item + newline for item in items]
            else:
                lines[first : last + 1] = [_dump({name: new[name]}, newline) + newline] if name in new else []
    text = "".join(lines)
    if added := {key: new[key] for key in new if key not in old}:
        if text and not text.endswith(("\n", "\r")):
            text += newline
        text += _dump(added, newline)
    return text.removesuffix("\n").removesuffix("\r")


def _is_longer(node: Any, old: Any, new: Any) -> bool:
    """Whether a list, written one item a line, only gained items: its lines may stay, with the comments among them."""
    block = isinstance(node, yaml.SequenceNode) and not node.flow_style
    return block and isinstance(old, list) and isinstance(new, list) and new[: len(old)] == old


def _last_line(node: Any) -> int:
    if isinstance(node, yaml.ScalarNode):
        return int(node.end_mark.line) - (1 if node.style in ("|", ">") and node.end_mark.column == 0 else 0)
    if node.flow_style or not node.value:
        return int(node.end_mark.line)
    last = node.value[-1]
    return _last_line(last[1] if isinstance(last, tuple) else last)


def _dump(data: dict[str, Any] | list[Any], newline: str) -> str:
    return str(yaml_dump(data, sort_keys=False, line_break=newline)).rstrip("\r\n")
