"""What a card shows is run, from the card as it lies on the Hub."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from card_snippets import snippets

from .. import hub_calls as calls
from ..hub_worker import HubWorker
from ..local_hub import LocalHub

REPO = "ann/shown"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    with LocalHub(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.fixture(scope="module")
def shown(hub: LocalHub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The snippets of the card of a tower that was pushed; each loads `ann/shown`."""
    worker = HubWorker(hub.env(tmp_path_factory.mktemp("cache")))
    worker.call(calls.push, REPO, 1)
    card = worker.call(calls.read_files, REPO, ["README.md"])["README.md"].decode()
    worker.close()
    found = snippets(card)
    assert all(f'"{REPO}"' in snippet for snippet in found.values())
    return found


def test_card_shows_every_way_to_load(shown: dict[str, str]) -> None:
    assert set(shown) == {"package", "transformers", "pipeline", "remote_code"}


@pytest.mark.parametrize("name", ["package", "transformers", "pipeline", "remote_code"])
def test_snippet_runs_and_gives_the_tower_s_embedding(
    shown: dict[str, str], name: str, hub: LocalHub, tmp_path: Path, fresh_process: Callable[..., str]
) -> None:
    environment = hub.env(tmp_path / "cache")
    expected = fresh_process(shown["package"] + "\nprint(embedding.flatten().tolist())", env=environment)
    code = shown[name] + "\nimport torch\nprint(torch.as_tensor(embedding).flatten().tolist())"
    if name == "remote_code":
        # Where this package cannot be imported: the code of the repository runs in its place.
        blocked = "import sys\nsys.modules['hf_timm_tower'] = None\n"
        code = blocked + code + "\nassert type(model).__module__.startswith('transformers_modules.'), type(model)"
    assert fresh_process(code, env=environment).splitlines()[-1] == expected.splitlines()[-1]
