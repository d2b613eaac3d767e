"""The Python of a model card."""

import re

_SNIPPET = re.compile(r"^<!-- snippet: (\w+) -->\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def snippets(card: str) -> dict[str, str]:
    """The code of a card by name: `package`, `transformers`, `pipeline`, `remote_code`; those that it has.

    A classifier's card has `embedding` too.
    """
    return {found[1]: found[2] for found in _SNIPPET.finditer(card.replace("\r\n", "\n"))}
