"""The form in which a custom head is stored, with the reason against each form that does not do."""

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..reader.config import TimmTowerConfig
from ..reader.errors import HeadError
from ..reader.skip_init import skip_init
from .registry import rebuild_stored, registered_spec
from .source_file import CODE_FILE, store_source
from .to_graph import to_graph
from .verify import verify_head


def store_head(
    head: nn.Module, example: torch.Tensor, *, code_for: TimmTowerConfig | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """The form in which a custom head comes back, verified.

    Args:
        head: The head, on the CPU; its weights, modes and the random state stay as they are.
        example: The head's input `[2, ...]`, float.
        code_for: The completed config, where the file of the head's class may be stored if no other form works.

    Returns:
        JSON for `config.head`, `{"form": "graph" | "registered" | "code", ...}`; and file name -> text of what the head
        needs beside it.

    Raises:
        HeadError: no form works, with the reason against each and the remedies.
    """
    forms: dict[str, Callable[[], dict[str, Any]]] = {
        "as data": lambda: {"form": "graph", "graph": json.loads(json.dumps(to_graph(head, example)))},
        "by registered name": lambda: registered_spec(head),
    }
    reasons = []
    for form, make_spec in forms.items():
        try:
            spec = make_spec()
            with skip_init():
                rebuilt = rebuild_stored(spec)
            _copy_weights(head, rebuilt)
            verify_head(head, rebuilt, example)
        except HeadError as error:
            reasons.append(f"{form}: {error}")
        else:
            return spec, {}
    if code_for is None:
        reasons.append("as code in the repository: only with include_code=True, and loading then needs trust")
    else:
        assert code_for.num_features is not None
        try:
            spec, source = store_source(head, example, in_features=code_for.num_features, embed_dim=code_for.embed_dim)
            return spec, {CODE_FILE: source}
        except HeadError as error:
            reasons.append(f"as code in the repository: {error}")
    raise HeadError(
        f"the head {type(head).__name__} cannot be stored so that it comes back. Nothing was written.\n"
        + "\n".join(f"  - {reason}" for reason in reasons)
        + "\nRemedies: put @register_head('a-name') on its class and make it with JSON arguments; or rewrite its "
        "forward with torch functions only, without branches on values; or replace it before saving."
    )


def _copy_weights(source: nn.Module, target: nn.Module) -> None:
    theirs, ours = source.state_dict(), target.state_dict()
    missing, unexpected = sorted(set(ours) - set(theirs)), sorted(set(theirs) - set(ours))
    if missing or unexpected:
        raise HeadError(f"rebuilt with other weight names: lacks {unexpected[:4]}, has {missing[:4]}")
    try:
        # assigned, so that the rebuilt head has the dtypes of the original
        target.load_state_dict({key: value.detach().clone() for key, value in theirs.items()}, assign=True)
    except RuntimeError as error:
        raise HeadError(f"rebuilt with other weight shapes: {error}") from error
