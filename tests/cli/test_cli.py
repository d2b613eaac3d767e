"""The command `hf-timm-tower`: what it prints, for people and for programs, and how it ends."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from hf_timm_tower import TimmModel
from hf_timm_tower.cli.app import app
from hf_timm_tower.embedding.stored import StoredEmbeddings

from ..local_hub import LocalHub


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("towers") / "tower"
    tower = TimmModel("test_vit", embed_dim=16)
    tower.lock()
    tower.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    noise = np.random.default_rng(0)
    for number in range(6):
        Image.fromarray(noise.integers(0, 256, (50, 60, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def as_json(*arguments: object) -> dict[str, object]:
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_help_comes_without_torch(fresh_process: Callable[..., str]) -> None:
    printed = fresh_process(
        """
        import sys
        from hf_timm_tower.cli import main
        for words in (["--help"], ["embed", "--help"]):
            sys.argv = ["hf-timm-tower", *words]
            try:
                main()
            except SystemExit as end:
                print("ended", end.code)
        print([name for name in ("torch", "timm", "transformers", "numpy", "PIL", "pyarrow") if name in sys.modules])
        """
    )
    assert printed.splitlines()[-1] == "[]"
    for word in ("inspect", "embed", "search", "verify", "push", "export", "--rows-per-shard"):
        assert word in printed
    assert printed.count("ended 0") == 2


def test_inspect_names_what_is_in_a_tower(saved: Path) -> None:
    facts = as_json("inspect", saved)
    assert (facts["trunk"], facts["embedding"], facts["runs_code"]) == ("test_vit", 16, "no")
    assert facts["frozen"] == {"parameters": ["trunk"]}
    assert facts["files"]["trunk.safetensors"] == (saved / "trunk.safetensors").stat().st_size
    text = run("inspect", saved).stdout
    assert "test_vit" in text
    assert "trunk.safetensors" in text


def test_what_a_stranger_wrote_reaches_no_terminal_as_it_is(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "tower")
    (folder / "a\x1b[2J\nforged: yes").touch()
    fingerprint = json.loads((folder / "fingerprint.json").read_text())
    fingerprint["made_with"] = {"torch\x1b[1m\u202e": "\x1b]0;title\x07\x9b1m"}
    (folder / "fingerprint.json").write_text(json.dumps(fingerprint))
    for command in ("inspect", "verify"):
        for done in (run(command, folder), run(command, folder, "--json")):
            assert set(done.output) & set("\x1b\x07\x9b\u202e") == set()
            assert "\nforged" not in done.output


@pytest.mark.parametrize(
    ("name", "change"), [("config.json", {"image_size": None}), ("model.safetensors.index.json", {"metadata": [1]})]
)
def test_inspect_of_a_damaged_tower_is_one_line(
    saved: Path, tmp_path: Path, name: str, change: dict[str, object]
) -> None:
    folder = shutil.copytree(saved, tmp_path / "tower")
    found = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**found, **change}))
    done = run("inspect", folder)
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert name in done.stderr


def test_embed_then_search(saved: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "photos.emb"
    facts = as_json("embed", images, "--to", out, "--tower", saved, "--workers", 0, "--dtype", "float16")
    assert facts == {"folder": str(out), "embeddings": 6, "shards": 1, "failures": 0}
    assert StoredEmbeddings(out).load()[1].dtype == torch.float16
    assert as_json("embed", images, "--to", out, "--dtype", "float16")["embeddings"] == 6, "the folder knows its tower"

    sheet = tmp_path / "sheet.png"
    found = as_json("search", out, images / "3.png", "-k", 2, "--sheet", sheet)
    assert found["neighbours"][0]["id"] == "3.png"
    assert len(found["neighbours"]) == 2
    with Image.open(sheet) as picture:
        assert picture.size == (3 * 200 + 8, 228)
    text = run("search", out, images / "3.png").stdout
    assert "3.png" in text
    assert "1.0000" in text


def test_a_folder_that_was_made_with_relative_paths_is_used_from_elsewhere(
    saved: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(saved.parent)
    run("embed", os.path.relpath(images), "--to", tmp_path / "out", "--tower", saved.name, "--workers", 0)
    monkeypatch.chdir(tmp_path)
    sheet = tmp_path / "sheet.png"
    assert as_json("search", "out", images / "3.png", "-k", 1, "--sheet", sheet)["neighbours"][0]["id"] == "3.png"
    with Image.open(sheet) as picture:
        assert picture.getpixel((300, 100)) == picture.getpixel((100, 100)) != (211, 211, 211), "the image was found"


def test_images_that_cannot_be_used_are_listed_and_end_with_3(
    saved: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "good.png").write_bytes((images / "0.png").read_bytes())
    (tmp_path / "in" / "bad.png").write_bytes(b"")
    done = run("embed", tmp_path / "in", "--to", tmp_path / "out", "--tower", saved, "--workers", 0)
    assert done.exit_code == 3
    assert "bad.png: an empty file" in done.stdout
    strict = run("embed", tmp_path / "in", "--to", tmp_path / "strict", "--tower", saved, "--workers", 0, "--strict")
    assert strict.exit_code == 1
    assert "bad.png" in strict.stderr
    for number in range(11):
        (tmp_path / "in" / f"bad{number:02}.png").write_bytes(b"")
    many = run("embed", tmp_path / "in", "--to", "many", "--tower", saved, "--workers", 0)
    assert many.stdout.count("an empty file") == 10
    assert "and 2 more, in many/failures.jsonl" in many.stdout


def test_errors_are_one_line_with_the_remedy(saved: Path, images: Path, tmp_path: Path) -> None:
    out, query = tmp_path / "out", images / "0.png"
    run("embed", images, "--to", out, "--tower", saved, "--workers", 0)
    cases = (
        (("embed", images, "--to", saved / "config.json" / "a", "--tower", saved), 1, "is a file: give a folder"),
        (("search", out, images), 1, "a folder, expected one image"),
        (("search", out, saved / "config.json"), 1, "config.json': not an image file that Pillow knows"),
        (("embed", images, "--to", out, "--normalize"), 1, "were {'normalize': False} and are {'normalize': True}"),
        (("search", out, query, "--sheet", tmp_path / "near.docx"), 1, "give a .png or .jpg"),
        (("search", out, query, "--sheet", tmp_path / "nowhere" / "near.png"), 1, "No such file or directory"),
        (("inspect", tmp_path), 1, "config.json is missing"),
        (("verify", "no/such-tower"), 1, "no such folder"),
        (("embed", tmp_path / "nowhere", "--to", tmp_path / "a", "--tower", saved), 1, "no such file or folder"),
        (("embed", images, "--to", tmp_path / "a"), 2, "--tower REPO"),
        (("search", tmp_path, images / "0.png"), 1, "no embeddings"),
        (("export", tmp_path, "--format", "timm", "--out", tmp_path / "b"), 1, "config.json is missing"),
    )
    for arguments, code, words in cases:
        done = run(*arguments)
        assert (done.exit_code, done.stdout) == (code, ""), arguments
        assert words in done.stderr
        assert done.stderr.startswith("hf-timm-tower: ")
        assert done.stderr.count("\n") == 1
        machine = run(*arguments, "--json")
        assert words in json.loads(machine.stdout)["error"]
    assert run("embed", images).exit_code == 2


def test_verify_and_export(saved: Path, tmp_path: Path) -> None:
    assert as_json("verify", saved)["status"] == "equal"
    assert run("verify", saved).stdout.startswith("equal: ")
    facts = json.loads((saved / "fingerprint.json").read_text())
    facts["made_with"]["threads"] = "77"
    other = shutil.copytree(saved, tmp_path / "other")
    (other / "fingerprint.json").write_text(json.dumps(facts))
    lines = run("verify", other).stdout.splitlines()
    assert any(line.startswith("  threads: saved with 77") for line in lines), lines
    assert str(tmp_path / "timm") in as_json("export", saved, "--format", "timm", "--out", tmp_path / "timm")["written"]
    assert os.path.exists(tmp_path / "timm" / "model.safetensors")


def test_push_then_inspect_from_the_hub_fetches_no_weights(
    saved: Path, images: Path, tmp_path: Path, fresh_process: Callable[..., str]
) -> None:
    commands = [
        ["push", str(saved), "ann/tower", "--json"],
        ["inspect", "ann/tower", "--json"],
        [],
        ["embed", str(images), "--to", str(tmp_path / "out"), "--tower", "ann/tower", "--workers", "0", "--json"],
    ]
    with LocalHub(tmp_path / "hub") as hub:
        printed = fresh_process(
            """
            import contextlib, json, pathlib, sys
            from hf_timm_tower.cli import main
            for words in json.loads(sys.argv[1]):
                if not words:
                    print(json.dumps([path.name for path in pathlib.Path(sys.argv[2]).rglob("*") if path.is_symlink()]))
                    continue
                before, sys.argv[1:] = sys.argv[1:], words
                with contextlib.suppress(SystemExit):
                    main()
                sys.argv[1:] = before
            """,
            json.dumps(commands),
            tmp_path / "cache",
            env={**hub.env(tmp_path / "cache"), "HF_HUB_OFFLINE": None},
        )
    pushed, facts, cached, embedded = map(json.loads, printed.splitlines())
    assert "ann/tower" in pushed["commit"]
    assert facts["commit"] in pushed["commit"]
    assert facts["files"]["trunk.safetensors"] == (saved / "trunk.safetensors").stat().st_size
    assert "config.json" in cached
    assert not [name for name in cached if name.endswith(".safetensors")]
    assert embedded["embeddings"] == 6
    assert StoredEmbeddings(tmp_path / "out").manifest["tower"]["commit"] == facts["commit"]


def test_names_that_the_outputs_encoding_does_not_have_are_escaped(saved: Path, images: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    shutil.copy(images / "0.png", tmp_path / "in" / "日本.png")
    run("embed", tmp_path / "in", "--to", tmp_path / "out", "--tower", saved, "--workers", 0)
    program = "from hf_timm_tower.cli import main; main()"
    words = [sys.executable, "-c", program, "search", tmp_path / "out", images / "0.png"]
    done = subprocess.run(words, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "cp1252"})
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\\u65e5\\u672c.png" in done.stdout
