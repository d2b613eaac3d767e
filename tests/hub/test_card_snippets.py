"""What a card shows is run, from the card as it lies on the Hub."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .. import hub_calls as calls
from ..card_snippets import snippets
from ..hub_worker import HubWorker
from ..local_hub import LocalHub

REPO = "ann/shown"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    with LocalHub(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.fixture(scope="module")
def client(hub: LocalHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubWorker]:
    worker = HubWorker(hub.env(tmp_path_factory.mktemp("cache")))
    yield worker
    worker.close()


@pytest.fixture(scope="module")
def shown(client: HubWorker) -> dict[str, str]:
    """The snippets of the card of a tower that was pushed; each loads `ann/shown`."""
    client.call(calls.push, REPO, 1)
    card = client.call(calls.read_files, REPO, ["README.md"])["README.md"].decode()
    found = snippets(card)
    assert all(f'"{REPO}"' in snippet for snippet in found.values())
    return found


def run(snippet: str) -> list[float]:
    """The embedding that a snippet gives; called in a client's process."""
    names: dict[str, Any] = {}
    exec(snippet, names)
    return [float(number) for number in names["embedding"].flatten()]


@pytest.fixture(scope="module")
def expected(client: HubWorker, shown: dict[str, str]) -> str:
    """What the package's own snippet gives."""
    return str(client.call(run, shown["package"]))


def test_card_shows_every_way_to_load(shown: dict[str, str]) -> None:
    assert set(shown) == {"package", "transformers", "pipeline", "remote_code"}


@pytest.mark.parametrize("name", ["package", "transformers", "pipeline", "remote_code"])
def test_snippet_runs_and_gives_the_tower_s_embedding(
    shown: dict[str, str],
    expected: str,
    name: str,
    hub: LocalHub,
    tmp_path: Path,
    fresh_process: Callable[..., str],
) -> None:
    code = shown[name] + "\nimport torch\nprint(torch.as_tensor(embedding).flatten().tolist())"
    if name == "remote_code":
        # Where this package cannot be imported: the code of the repository runs in its place.
        blocked = "import sys\nsys.modules['hf_timm_tower'] = None\n"
        code = blocked + code + "\nassert type(model).__module__.startswith('transformers_modules.'), type(model)"
    assert fresh_process(code, env=hub.env(tmp_path / "cache")).splitlines()[-1] == expected
