"""Repositories as an enemy, a bug or a slip of the hand would make them: mutations of a good tower's files."""

import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

Files = dict[str, bytes]

MARK = "a stranger's code ran"
EVIL = f"import os, sys\nos.environ['TOWER_TEST_EVIL'] = {MARK!r}\nprint({MARK!r}, file=sys.stderr)\n".encode()

NUMBERS = (0, -1, 1, 2, 3, 7, 10**3, 10**9, 10**18, 2**63, -(2**63), 0.5, 1e308, -1e-308)
TEXTS = (
    "",
    "none",
    "token",
    "..",
    "../../evil.safetensors",
    "/etc/passwd",
    "os.system",
    "builtins.eval",
    "torch.load",
    "torch.nn.Linear",
    "timm.layers.Mlp",
    "__class__",
    "__reduce__",
    "evil.py",
    "hf-hub:ann/evil",
    "local-dir:/tmp",
    "resnet18",
    "vit_giant_patch14_dinov2",
    "a" * 10_000,
    "\x00",
    "\u202egnp",
    "%s%n{0.__class__}",
)
OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [[]], [None], {"class": "os.system"}, {"form": "code"}, [1, 2, 3])


def junk(dice: random.Random) -> Any:
    """Some JSON value or other."""
    return dice.choice(dice.choice((NUMBERS, TEXTS, OTHERS)))


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of everything inside a JSON value."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


def change_json(document: Any, dice: random.Random, changes: int) -> None:
    """Replace, delete, repeat, rename or nest something at random places."""
    for _ in range(changes):
        where = places(document)
        if not where:
            return
        *way, last = dice.choice(where)
        parent = document
        for step in way:
            parent = parent[step]
        act = dice.randrange(6)
        if act <= 1:
            parent[last] = junk(dice)
        elif act == 2:
            del parent[last]
        elif act == 3 and isinstance(parent, list):
            parent.extend([parent[last]] * dice.choice((1, 50, 5000)))
        elif act == 3:
            parent[str(junk(dice))[:50]] = parent[last]
        elif act == 4 and isinstance(parent[last], int) and not isinstance(parent[last], bool):
            parent[last] = dice.choice((parent[last] + 1, parent[last] - 1, parent[last] * 2, parent[last] * 10**6))
        elif act == 4 and isinstance(parent[last], str) and parent[last]:
            at = dice.randrange(len(parent[last]))
            parent[last] = parent[last][:at] + dice.choice("aZ0_./\u00e9") + parent[last][at + 1 :]
        else:
            for _ in range(dice.choice((1, 3, 100))):
                parent[last] = [parent[last]]


def in_config(files: Files, dice: random.Random) -> None:
    config = json.loads(files["config.json"])
    change_json(config, dice, dice.randint(1, 2))
    files["config.json"] = json.dumps(config).encode()


def in_graph(files: Files, dice: random.Random) -> None:
    config = json.loads(files["config.json"])
    change_json(config["head"]["graph"], dice, dice.randint(1, 3))
    files["config.json"] = json.dumps(config).encode()


def with_wanted_terabyte(files: Files, dice: random.Random) -> None:
    config = json.loads(files["config.json"])
    config.update(
        dice.choice(
            (
                {"model_args": {"base_width": 10**7}},
                {"model_args": {"layers": [10**5] * 4}},
                {"model_args": {"channels": [2**28] * 4}},
                {"architecture": "vit_giant_patch14_dinov2"},
                {"architecture": "vit_tiny_patch16_224", "model_args": {"embed_dim": 3 * 2**20, "depth": 10**5}},
                {"image_size": [2**14, 2**14]},
                {"in_chans": 4096, "embed_dim": 2**20},
                {"num_labels": 10**9},
                {"id2label": {str(number): "x" for number in range(10**5)}},
            )
        )
    )
    files["config.json"] = json.dumps(config).encode()


def with_other_door(files: Files, dice: random.Random) -> None:
    """Entries that make other loaders run or fetch something."""
    config = json.loads(files["config.json"])
    config.update(
        dice.choice(
            (
                {"auto_map": {"AutoModel": "evil.Model", "AutoConfig": "evil.Config"}},
                {"head": {"form": "code", "file": "evil.py", "class": "Evil", "kwargs": {}, "sha256": "0" * 64}},
                {"head": {"form": "code", "file": "../evil.py", "class": "Evil", "kwargs": {}, "sha256": "0" * 64}},
                {"head": {"form": "registered", "name": "os.system", "kwargs": {"command": "true"}}},
                {"head": {"form": "subclass", "class": "Evil"}, "tower_class": "Evil"},
                {"tower_class": "evil.Evil", "tower_kwargs": {"model_name": "evil"}},
                {"pretrained_cfg": {"file": "evil.pt", "custom_load": True}},
                {"model_args": {"checkpoint_path": "evil.pt"}},
                {"model_args": {"pretrained": True}},
                {"model_args": {"act_layer": {"class": "evil.Evil"}}},
                {"quantization_config": {"quant_method": "evil"}},
                {"trunk_source": {"repo_id": "ann/evil"}},
                {
                    "trunk_source": {
                        "repo_id": "../../etc",
                        "commit": "0" * 40,
                        "layout": "timm",
                        "files": {"../passwd": "0" * 64},
                        "unused": [],
                    }
                },
            )
        )
    )
    files["config.json"] = json.dumps(config).encode()


def in_index(files: Files, dice: random.Random) -> None:
    index = json.loads(files["model.safetensors.index.json"])
    keys = sorted(index["weight_map"])
    act = dice.randrange(6)
    if act == 0:
        name = dice.choice(("../trunk.safetensors", "/etc/passwd", "core/../x.safetensors", "evil.py", "a\\b", "*"))
        for key in keys if dice.random() < 0.5 else keys[:1]:
            index["weight_map"][key] = name
    elif act == 1:
        index["weight_map"][dice.choice(keys)] = "head.safetensors"
    elif act == 2:
        index["metadata"]["tied"] = [[dice.choice(keys), dice.choice(keys)], ["nobody", keys[0]]][: dice.randint(1, 2)]
    elif act == 3:
        for number in range(dice.choice((1, 100, 20_000))):
            index["weight_map"][f"trunk.extra.{number}"] = f"trunk-{number % 7:05d}-of-00007.safetensors"
    else:
        change_json(index, dice, dice.randint(1, 3))
    files["model.safetensors.index.json"] = json.dumps(index).encode()


def in_header(files: Files, dice: random.Random) -> None:
    name = dice.choice(("trunk.safetensors", "head.safetensors"))
    data = files[name]
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    keys = [key for key in header if key != "__metadata__"]
    key = dice.choice(keys)
    entry = header[key]
    act = dice.randrange(9)
    if act == 0:
        entry["shape"] = dice.choice(([10**12], [2**40, 2**40], [-1], [0], entry["shape"][::-1], [*entry["shape"], 1]))
    elif act == 1:
        entry["dtype"] = dice.choice(("F64", "F16", "BF16", "I8", "BOOL", "OBJECT", "", 3))
    elif act == 2:
        begin, end = entry["data_offsets"]
        entry["data_offsets"] = dice.choice(([begin, end + 4], [end, begin], [0, 10**15], [-4, end], [begin], "x"))
    elif act == 3:
        header[key] = dict(header[dice.choice(keys)])
    elif act == 4:
        del header[key]
    elif act == 5:
        header[dice.choice(("../x", "trunk." + "a" * 10_000, "__metadata__", "head.weight"))] = entry
    elif act == 6:
        change_json(header, dice, dice.randint(1, 3))
    text = json.dumps(header).encode()
    if act == 7:
        text = dice.choice((b"", b"[]", b"{" * 5000, text[:-1], b"\xff" + text, b"null"))
    size = len(text) if act != 8 else dice.choice((0, 2**63, 2**31, len(text) + 1, len(text) // 2))
    files[name] = struct.pack("<Q", size) + text + (body[: dice.randrange(len(body))] if act == 8 else body)


def in_bytes(files: Files, dice: random.Random) -> None:
    """Any byte of any JSON file, or the end of any file."""
    name = dice.choice(sorted(name for name in files if name.endswith((".json", ".safetensors"))))
    data = bytearray(files[name])
    if name.endswith(".json") and dice.random() < 0.7:
        data[dice.randrange(len(data))] = dice.randrange(256)
    else:
        del data[dice.randrange(len(data)) :]
    files[name] = bytes(data)


def without_a_file(files: Files, dice: random.Random) -> None:
    del files[dice.choice(sorted(name for name in files if name.endswith((".json", ".safetensors"))))]


def in_other_json(files: Files, dice: random.Random) -> None:
    name = dice.choice(("fingerprint.json", "preprocessor_config.json"))
    document = json.loads(files[name])
    change_json(document, dice, dice.randint(1, 3))
    files[name] = json.dumps(document).encode()


MUTATORS: tuple[Callable[[Files, random.Random], None], ...] = (
    in_config,
    in_graph,
    in_graph,
    with_wanted_terabyte,
    with_other_door,
    in_index,
    in_header,
    in_bytes,
    without_a_file,
    in_other_json,
)


def mutant(good: Files, seed: int) -> tuple[str, Files]:
    """A bad copy of a good tower's files, with a stranger's code in every place where code could lie."""
    dice = random.Random(seed)
    files = dict(good)
    mutate = MUTATORS[seed % len(MUTATORS)]
    mutate(files, dice)
    for name in [name for name in files if name.startswith("core/")] + ["evil.py", "head_code.py", "__init__.py"]:
        files[name] = EVIL
    return mutate.__name__, files


# --- in a folder, where there is more than files


def in_fingerprint(files: Files, dice: random.Random) -> None:
    document = json.loads(files["fingerprint.json"])
    change_json(document, dice, dice.randint(1, 3))
    files["fingerprint.json"] = json.dumps(document).encode()


def in_processor(files: Files, dice: random.Random) -> None:
    document = json.loads(files["preprocessor_config.json"])
    change_json(document, dice, dice.randint(1, 3))
    files["preprocessor_config.json"] = json.dumps(document).encode()


def with_copied_part(files: Files, dice: random.Random) -> None:
    """A part of one JSON file in the place of a part of the same or another one."""
    names = sorted(name for name in files if name.endswith(".json"))
    name, other = dice.choice(names), dice.choice(names)
    document, source = json.loads(files[name]), json.loads(files[other])
    ways = dice.choice(places(document) or [()]), dice.choice(places(source) or [()])
    value = source
    for step in ways[1]:
        value = value[step]
    if ways[0]:
        *way, last = ways[0]
        parent = document
        for step in way:
            parent = parent[step]
        parent[last] = value
    files[name] = json.dumps(document).encode()


CARDS = (
    b"",
    b"\xff\xfe\x00",
    b"---\n---\n",
    b"---\nlicense: [\n---\n",
    b"---\n" + b"a: &a [x]\n" + b"".join(b"b%d: &b%d [*a, *a]\n" % (n, n) for n in range(30)) + b"---\n",
    b"---\na: &a [*a]\n---\n",
    b"---\nx: !!python/object/apply:os.system ['true']\n---\n",
    b"---\nlicense: mit\n" * 500,
    b"---\n" + b"tags:\n" + b"- x\n" * 20_000 + b"---\n",
    b"<!-- hf_timm_tower: " * 300,
    b"[" * 50_000,
    b"| a " * 20_000,
    b"\x1b[2J\x1b]0;title\x07",
)


def in_card(files: Files, dice: random.Random) -> None:
    card = files["README.md"]
    act = dice.randrange(4)
    if act == 0:
        files["README.md"] = dice.choice(CARDS)
    elif act == 1:
        at = dice.randrange(len(card))
        files["README.md"] = card[:at] + dice.choice(CARDS)[:5000] + card[at:]
    elif act == 2:
        lines = card.splitlines(keepends=True)
        for _ in range(dice.choice((1, 3, 30))):
            place = dice.randrange(len(lines))
            lines[place : place + dice.randrange(3)] = [dice.choice(lines)] * dice.randrange(3)
        files["README.md"] = b"".join(lines)
    else:
        files["README.md"] = card[: dice.randrange(len(card))]


STRAY_NAMES = (
    "model.safetensors",
    "pytorch_model.bin",
    "adapter_config.json",
    "adapter_model.safetensors",
    "generation_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "modules.json",
    "config_sentence_transformers.json",
    "trunk-00001-of-00002.safetensors",
    "modeling_timm_tower.py",
    "modeling_evil.py",
    "core/evil.py",
    "core",
    ".tower-commit/plan.json",
    ".tower-commit/new/config.json",
    ".tower-commit",
    ".tower.tower-save-1",
    "README.md",
    "Config.json",
    "x/y/z",
)


def put_stray(folder: Path, outside: Path, good: Files, dice: random.Random) -> None:
    """Something that is no file of the tower, or a file of it that is no file, beside or in place of what is there.

    Args:
        folder: The tower's folder.
        outside: A folder with a file `secret`, which nothing may read or change.
        good: The tower's files, for contents that look right.
        dice: What is put where.
    """
    name = dice.choice(STRAY_NAMES if dice.random() < 0.7 else sorted(name for name in good if "/" not in name))
    path = folder / name
    # What an earlier stray left may be a link that leads outside: this one is put into the folder itself.
    for parent in list(reversed(path.relative_to(folder).parents))[1:]:
        if (folder / parent).is_symlink() or ((folder / parent).exists() and not (folder / parent).is_dir()):
            (folder / parent).unlink()
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() and not path.is_symlink():
        path = path / "inside"
    path.unlink(missing_ok=True)
    act = dice.randrange(6)
    if act == 0:
        path.mkdir()
    elif act == 1:
        path.symlink_to(dice.choice((outside / "secret", outside, Path("/dev/zero"), path, Path("/proc/self/environ"))))
    elif act == 2:
        os.mkfifo(path)
    elif act == 3:
        plan = {"replace": ["../outside/secret"], "remove": ["../outside/secret", "config.json"], "version": 1}
        path.write_bytes(json.dumps(plan).encode())
    elif act == 4:
        path.write_bytes(EVIL)
    else:
        path.write_bytes(dice.choice([good[each] for each in sorted(good)]))


FOLDER_MUTATORS: tuple[Callable[[Files, random.Random], None], ...] = (
    *MUTATORS,
    in_config,
    in_graph,
    in_index,
    in_header,
    in_fingerprint,
    in_processor,
    with_copied_part,
    in_card,
)


def folder_mutant(good: Files, seed: int, folder: Path, outside: Path) -> str:
    """Write a bad copy of a good tower into an empty folder; what kind it is."""
    dice = random.Random(seed)
    files = dict(good)
    number = seed % (len(FOLDER_MUTATORS) + 2)
    if number < len(FOLDER_MUTATORS):
        mutate = FOLDER_MUTATORS[number]
        mutate(files, dice)
        kind = mutate.__name__
    else:
        kind = "put_stray"
    files |= {"evil.py": EVIL, "head_code.py": EVIL, "__init__.py": EVIL}
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    if kind == "put_stray":
        for _ in range(dice.choice((1, 1, 3))):
            put_stray(folder, outside, good, dice)
    return kind
