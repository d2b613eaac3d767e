"""STUB until the heads room lands."""
from ..reader.errors import HeadError
from ..reader.head import known_arguments
from ..reader.head import store_head as _store
from .head_code import describe_code


def store_head(head, example, config, *, include_code=False):
    try:
        return _store(head, example), {}
    except HeadError as refused:
        if not include_code:
            raise
        try:
            spec, source = describe_code(head, example, in_features=config.num_features, embed_dim=config.embed_dim, arguments=known_arguments(head))
        except HeadError as error:
            raise HeadError(f"{refused}\nNeither as code: {error}") from error
        return spec, {"head_code.py": source}
