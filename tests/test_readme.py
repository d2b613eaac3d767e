"""Everything that the README shows is run: its Python, its commands' names, and the output that it quotes."""

import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from hf_timm_tower.reader.config import OUR_FIELDS

from .local_hub import LocalHub

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

_NEW_PROCESS = "<!-- new process -->"
_FENCE = re.compile(r"^(?P<indent> *)```python\n(?P<code>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)


def programs() -> list[str]:
    """The README's Python, one program for each process that it speaks of; later ones use what earlier ones saved."""
    return [
        "\n".join(textwrap.dedent(block["code"]) for block in _FENCE.finditer(part))
        for part in README.split(_NEW_PROCESS)
    ]


def test_readme_python_runs(tmp_path: Path, fresh_process: Callable[..., str]) -> None:
    blocks = README.count("```python\n")
    assert blocks >= 3
    assert sum(1 for _ in _FENCE.finditer(README)) == blocks, "a Python block is fenced in a way the test does not see"
    Image.effect_noise((320, 240), 80).convert("RGB").save(tmp_path / "cat.jpg")
    with LocalHub(tmp_path / "hub", users={"me": "hf_me"}) as hub:
        for number, program in enumerate(programs()):
            script = tmp_path / f"readme_{number}.py"
            # Registered heads need a file that Python can read again; the folder is where the README's names lead.
            script.write_text(f"import os\nos.chdir({str(tmp_path)!r})\n{program}", encoding="utf-8")
            fresh_process(script, env=hub.env(tmp_path / "cache"))


def test_readme_loads_in_a_process_that_does_not_know_the_head() -> None:
    loading = programs()[1].split("tower.transform()")[0]
    assert "from_pretrained" in loading
    assert "CustomHead" not in loading


def test_readme_quotes_what_the_plain_mixin_does() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "plain_mixin.py"], capture_output=True, text=True, check=True, timeout=300
    )
    quoted = re.search(r"`python scripts/plain_mixin\.py`\):\n\n```text\n(.*?)```", README, re.DOTALL)
    assert quoted is not None, "the README no longer quotes scripts/plain_mixin.py"
    assert done.stdout == quoted[1]


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(((?!https?:|#)[^)]+)\)", README))))
def test_readme_links_lead_to_files(link: str) -> None:
    assert (ROOT / link).exists()


def test_format_document_describes_every_field_of_the_config() -> None:
    document = (ROOT / "docs" / "format.md").read_text(encoding="utf-8")
    section = document.split("## `config.json`")[1].split("\n## ")[0]
    described = {
        name for row in re.findall(r"^\| (`.+?) \|", section, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
    }
    of_transformers = {"model_type", "transformers_version", "architectures", "auto_map"}
    of_a_backbone = {"out_indices", "out_features"}
    assert described - of_transformers - of_a_backbone == set(OUR_FIELDS)


def test_every_promise_of_security_md_names_a_test_that_is_there() -> None:
    named = re.findall(r"(tests/[\w/]+\.py)(?:::(test_\w+))?", (ROOT / "SECURITY.md").read_text(encoding="utf-8"))
    assert len(named) > 10
    for path, name in named:
        assert (ROOT / path).is_file(), path
        assert not name or f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), f"{path}::{name}"


def test_the_files_that_scripts_test_and_the_order_of_tests_name_are_there() -> None:
    left_out = re.findall(r"^    (tests/\S+)$", (ROOT / "scripts" / "test").read_text(encoding="utf-8"), re.MULTILINE)
    order = re.search(
        r'_LONG_FILES = """(.*?)"""', (ROOT / "tests" / "conftest.py").read_text(encoding="utf-8"), re.DOTALL
    )
    assert order is not None
    named = [*left_out, *(f"tests/{name}" for name in order[1].split())]
    assert len(named) > 30
    assert [name for name in named if not (ROOT / name).is_file()] == []
