"""Towers that older versions of the package saved load with the bits that they gave then.

Recorded by tests/fixtures/record.py, which says what they are: in this package by both faces, and in stock transformers
where the package is absent, by the `core/` that every tower carried then.
"""

import json
import shutil
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_timm_tower.files.fingerprint import TOLERANCES, probe_image

from ..home_processes import make_environment

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
RECORDED = FIXTURES / "towers_0_1"
TOWERS = sorted(path.parent.name for path in RECORDED.glob("*/expected.json"))

# Loads every tower by one face and prints what each gives, or how it is refused.
LOAD = """
import json, sys, traceback, warnings
import torch
torch.set_num_threads(1)
job = json.loads(sys.argv[1])
sys.path.insert(0, job["fixtures"])
from record import measured, pixels
if job["face"] == "stock transformers":
    try:
        import hf_timm_tower
    except ImportError:
        pass
    else:
        raise SystemExit("the package is not absent")
else:
    sys.path.insert(0, job["recorded"])
    import heads  # registers one of them
found = {}
for name, folder in job["towers"].items():
    kwargs = {}
    if job["face"] == "TimmModel":
        from hf_timm_tower import TimmModel as cls
    elif name == "classifier":
        from transformers import AutoModelForImageClassification as cls
    else:
        from transformers import AutoModel as cls
    if job["face"] == "stock transformers" or name == "code":
        kwargs["trust_remote_code"] = True
    try:
        model = cls.from_pretrained(folder, **kwargs)
        assert not model.training
        found[name] = measured(model, torch.load(job["image"]))
        found[name]["pixels"] = pixels(folder, **({"trust_remote_code": True} if "stock" in job["face"] else {}))
    except Exception as error:
        found[name] = {"refused": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
print("FOUND", json.dumps(found))
"""


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recorded towers as they were on disk, the probe image, and a cache of the Hub that has the pinned trunk."""
    root = tmp_path_factory.mktemp("old")
    for name in TOWERS:
        shutil.copytree(RECORDED / name, root / name, ignore=shutil.ignore_patterns("expected.json"))
        with zipfile.ZipFile(RECORDED / "core.zip") as core:
            core.extractall(root / name)
    # huggingface_hub's own layout, as a download leaves it.
    pinned = json.loads((RECORDED / "pinned" / "config.json").read_text())["trunk_source"]
    hub_cache = root / "cache" / f"models--{pinned['repo_id'].replace('/', '--')}"
    for folder in ("blobs", "refs"):
        (hub_cache / folder).mkdir(parents=True)
    (hub_cache / "refs" / "main").write_text(pinned["commit"])
    (hub_cache / "snapshots" / pinned["commit"]).mkdir(parents=True)
    for file in (RECORDED / "pinned-trunk").iterdir():
        blob = pinned["files"].get(file.name, f"{file.stem:0>40.40}")
        shutil.copyfile(file, hub_cache / "blobs" / blob)
        (hub_cache / "snapshots" / pinned["commit"] / file.name).symlink_to(f"../../blobs/{blob}")
    torch.save(probe_image(3, [32, 32]), root / "image.pt")
    return root


FACES = ("TimmModel", "AutoModel", "stock transformers")


@pytest.fixture(scope="module")
def given(
    copies: Path, fresh_process: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Any]]:
    """`given(face)`: what each tower gives in it, on this machine. Stock transformers runs the code of then."""

    @cache
    def run(kind: str) -> dict[str, Any]:
        job = {
            "face": kind,
            "fixtures": str(FIXTURES),
            "recorded": str(RECORDED),
            "towers": {name: str(copies / name) for name in TOWERS},
            "image": str(copies / "image.pt"),
        }
        variables = {"HF_HUB_CACHE": str(copies / "cache"), "HF_HUB_OFFLINE": "1"}
        if kind == "stock transformers":
            environment = make_environment(tmp_path_factory.mktemp("stock") / "venv")
            printed = environment.run(LOAD, json.dumps(job), env=variables)
        else:
            printed = fresh_process(LOAD, json.dumps(job), env=variables)
        line = next(line for line in printed.splitlines() if line.startswith("FOUND "))
        return dict(json.loads(line.removeprefix("FOUND ")))

    return run


def near(found: str, expected: str) -> bool:
    """Whether two outputs, bytes of float32 in hex, are the same within verify()'s tolerance."""
    ours, theirs = (torch.frombuffer(bytearray.fromhex(each), dtype=torch.float32) for each in (found, expected))
    return bool((ours - theirs).abs().max() <= TOLERANCES["torch.float32"] * theirs.abs().max())


@pytest.mark.parametrize("kind", FACES)
@pytest.mark.parametrize("name", TOWERS)
def test_an_old_tower_gives_what_it_gave(name: str, kind: str, given: Callable[[str], dict[str, Any]]) -> None:
    """What was recorded, on another machine, within tolerance; what the code of then gives on this one, bit for bit."""
    found, then = given(kind)[name], given("stock transformers")[name]
    if (kind, name) == ("stock transformers", "registered"):
        assert "recorded_towers.mixing" in found["refused"], "the class is registered by code that is not here"
        assert "register" in found["refused"]
        return
    assert "refused" not in found, found["trace"]
    expected = json.loads((RECORDED / name / "expected.json").read_text())
    outputs = {"logits"} if name == "classifier" and kind != "TimmModel" else {"embedding"}
    compared = 0
    for mode in ("eval", "train"):
        assert set(found[mode]) >= outputs
        for output in outputs:
            assert near(found[mode][output], expected[mode][output]), f"{mode}: other {output}"
            if output in then.get(mode, {}):
                assert found[mode][output] == then[mode][output], f"{mode}: other last bits of {output}"
                compared += 1
    assert compared == 2 or name == "registered" or (name, kind) == ("classifier", "TimmModel")
    assert found["pixels"] == expected["pixels"]
    assert (found["frozen"], found["frozen_statistics"]) == (expected["frozen"], expected["frozen_statistics"])


def test_the_recorded_towers_are_those_that_the_script_makes() -> None:
    names = "builtin graph graph-two-modes registered code locked classifier sharded pinned"
    assert set(TOWERS) == set(names.split())
    forms = {}
    for name in TOWERS:
        config = json.loads((RECORDED / name / "config.json").read_text())
        forms[name] = (config.get("head") or {}).get("form")
    assert [name for name in TOWERS if forms[name] == "graph"] == ["graph", "graph-two-modes", "pinned"]
    assert (forms["registered"], forms["code"]) == ("registered", "code")
    assert len(list((RECORDED / "sharded").glob("trunk-*.safetensors"))) > 1
    assert json.loads((RECORDED / "locked" / "expected.json").read_text())["frozen_statistics"]
