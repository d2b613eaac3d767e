"""Heads as code: the stored file stands alone, gives the same bits, and is never run unasked."""

import copy
import hashlib
import importlib
import inspect
import json
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from rebuild_heads import observe
from safetensors.torch import load_file, save_file
from torch import nn

import heads_in_the_wild
from heads_in_the_wild import HEADS, DomainAdversarialHead, GreedyHashHead, Head
from hf_timm_tower import HeadError, register_head
from hf_timm_tower.heads.source_file import construct_code, store_source
from hf_timm_tower.reader.head import refuse_code
from hf_timm_tower.reader.skip_init import skip_init

ROOT = Path(__file__).parents[2]
SHAPES = {"vector": (96,), "map": (96, 5, 5), "tokens": (101, 64)}
CODE = [head for head in HEADS if head.kind == "code"]


class Apart(nn.Module):
    """Takes outputs of a class of the head's own apart, for `observe`."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: torch.Tensor) -> Any:
        y = self.head(x)
        return y if isinstance(y, (torch.Tensor, tuple, dict)) else dict(vars(y))


REBUILD = f"""
import importlib.util, json, sys
from pathlib import Path
import torch
from torch import nn
from typing import Any
from safetensors.torch import load_file, save_file
from hf_timm_tower.heads.registry import known_arguments
from hf_timm_tower.heads.source_file import construct_code
from hf_timm_tower.reader.skip_init import skip_init

{inspect.getsource(Apart)}

torch.set_num_threads(1)
folder, helper, *unknown = sys.argv[1:]
assert not [name for name in unknown if importlib.util.find_spec(name)], "this process must not know the heads"
spec = importlib.util.spec_from_file_location("rebuild_heads", helper)
rebuild_heads = importlib.util.module_from_spec(spec)
spec.loader.exec_module(rebuild_heads)
for path in sorted(Path(folder).glob("*.json")):
    stored = json.loads(path.read_text())
    code = path.with_suffix(".py")
    with skip_init():
        head = construct_code(stored["head"], code.read_text(), where=str(code))
    head.load_state_dict(load_file(path.with_suffix(".safetensors")), strict=True)
    save_file(rebuild_heads.observe(Apart(head), tuple(stored["shape"])), path.with_suffix(".found.safetensors"))
"""


def store(head: nn.Module, shape: tuple[int, ...], **arguments: Any) -> tuple[dict[str, Any], str]:
    width = shape[-1] if len(shape) == 2 else shape[0]
    return store_source(head, torch.zeros(2, *shape), **{"in_features": width, "embed_dim": None, **arguments})


def write(folder: Path, name: str, head: nn.Module, shape: tuple[int, ...], **arguments: Any) -> str:
    spec, source = store(head, shape, **arguments)
    (folder / f"{name}.json").write_text(json.dumps({"head": spec, "shape": shape}, sort_keys=True))
    (folder / f"{name}.py").write_text(source)
    save_file({key: value.clone() for key, value in head.state_dict().items()}, folder / f"{name}.safetensors")
    return source


def rebuild(folder: Path, run: Callable[..., str], *unknown: str) -> None:
    run(REBUILD, folder, ROOT / "tests" / "rebuild_heads.py", *unknown)


def make(entry: Head) -> nn.Module:
    torch.manual_seed(0)
    return entry.make(*SHAPES[entry.form])


@pytest.fixture
def users_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModuleType]:
    """`users_module(heads=..., other=...)` writes files of a user's own, imports them, and gives the first."""
    folder = tmp_path / "users"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)

    def load(**sources: str) -> ModuleType:
        for name, source in sources.items():
            path = folder / (name.replace("__", "/") + ".py")
            path.parent.mkdir(exist_ok=True)
            path.write_text(textwrap.dedent(source))
        importlib.invalidate_caches()
        return importlib.import_module(next(iter(sources)).replace("__", "."))

    return load


# It comes back


def test_every_code_head_of_the_corpus_comes_back_where_it_is_unknown(
    tmp_path: Path, fresh_process: Callable[..., str]
) -> None:
    torch.set_num_threads(1)
    assert len(CODE) >= 7
    for entry in CODE:
        write(tmp_path, entry.name, make(entry), SHAPES[entry.form], embed_dim=entry.embed_dim)
    rebuild(tmp_path, fresh_process, "heads_in_the_wild")
    for entry in CODE:
        found = load_file(tmp_path / f"{entry.name}.found.safetensors")
        expected = observe(Apart(make(entry)), SHAPES[entry.form])
        assert found.keys() == expected.keys()
        different = [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])]
        assert not different, entry.name


OPERATOR_HEAD = """
    import torch
    from torch import nn

    @torch.library.custom_op("{name}::scale", mutates_args=())
    def scale(x: torch.Tensor) -> torch.Tensor:
        return x * {factor}

    @scale.register_fake
    def _(x):
        return torch.empty_like(x)

    scale.register_autograd(lambda ctx, grad: grad * {factor})

    class Scaled(nn.Module):
        def __init__(self, in_features, embed_dim):
            super().__init__()
            self.linear = nn.Linear(in_features, embed_dim)

        def forward(self, x):
            return scale(self.linear(x))
"""


def test_an_operator_that_is_in_use_stays_whole_when_its_head_is_stored(users_module: Any) -> None:
    # torch destroys an operator when one of its name is registered again: numbers of freed memory, or a crash
    head = users_module(of_a_user=OPERATOR_HEAD.format(name="stays_whole", factor=3)).Scaled(8, 4)
    operator = torch.ops.stays_whole.scale.default
    image = torch.randn(2, 8)
    spec, source = store(head, (8,), embed_dim=4)
    assert torch.ops.stays_whole.scale.default is operator
    again = construct_code(spec, source, where="head_code.py")
    again.load_state_dict(head.state_dict())
    assert torch.equal(again(image), head(image))
    assert torch.equal(head(image), head.linear(image) * 3)
    gradients = torch.autograd.grad(head(image).sum(), head.linear.weight)
    assert torch.equal(gradients[0], torch.autograd.grad((head.linear(image) * 3).sum(), head.linear.weight)[0])


def test_two_operators_of_one_name_are_refused_and_the_first_stays(users_module: Any) -> None:
    head = users_module(of_another=OPERATOR_HEAD.format(name="of_one_name", factor=3)).Scaled(8, 4)
    spec, source = store(head, (8,), embed_dim=4)
    other = source.replace("x * 3", "x * 5")
    spec = {**spec, "sha256": hashlib.sha256(other.encode()).hexdigest()} if "sha256" in spec else spec
    with pytest.raises(HeadError, match=r"operator 'of_one_name::scale'.*another"):
        construct_code(spec, other, where="head_code.py")
    image = torch.randn(2, 8)
    assert torch.equal(head(image), head.linear(image) * 3)


USERS_HEAD = """
    import os
    from typing import NamedTuple
    import torch
    import torch.nn as nn
    from torch.nn import functional as F
    from hf_timm_tower import register_head

    # a page \x0c break, which ends no line
    API_KEY = os.environ.get("ACME_KEY")
    PLACE = os.path.join(os.path.expanduser("~"), "clients")
    SCALE = 0.5

    class Out(NamedTuple):
        y: torch.Tensor

    class Base(nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.fc = nn.Linear(dim, 3)

    @register_head("a-users-head")
    class Mine(Base):
        def __init__(self, dim: int, *, gain=2.0, names=("a",)):
            super().__init__(dim)
            self.scale = gain * len(names)

        def forward(self, x: torch.Tensor) -> Out:
            x = F.relu(self.fc(x)) * SCALE * self.scale
            return Out(x if x.sum() > 0 and (API_KEY, PLACE) else -x)

    if __name__ == "__main__":
        print(Mine(3))
"""


def test_the_file_is_stored_as_it_is_and_comes_back_where_it_is_unknown(
    tmp_path: Path,
    users_module: Callable[..., ModuleType],
    fresh_process: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.set_num_threads(1)
    monkeypatch.setenv("ACME_KEY", "sk-live-0123456789")
    module = users_module(acme_mine=USERS_HEAD)
    head = module.Mine(96, gain=0.75, names=["a", "b"])
    expected = observe(Apart(copy.deepcopy(head)), (96,))
    stored = tmp_path / "stored"
    stored.mkdir()
    source = write(stored, "mine", head, (96,))
    assert source == Path(str(module.__file__)).read_text()
    written = "".join(path.read_text() for path in stored.glob("*.[pj]*"))
    assert not [secret for secret in ("sk-live", str(Path.home()) + "/clients", str(tmp_path)) if secret in written]
    rebuild(stored, fresh_process, "acme_mine")
    found = load_file(stored / "mine.found.safetensors")
    assert found.keys() == expected.keys()
    assert not [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])]


def test_a_registered_class_keeps_its_name_when_its_file_runs_again(users_module: Callable[..., ModuleType]) -> None:
    module = users_module(acme_again=USERS_HEAD.replace("a-users-head", "another-users-head"))
    head = module.Mine(96)
    store(head, (96,))
    assert register_head("another-users-head")(module.Mine) is module.Mine


@pytest.mark.parametrize(
    ("make_head", "kwargs"),
    [
        (lambda: DomainAdversarialHead(96, alpha=0.3), {"dim": 96, "alpha": 0.3}),
        (lambda: GreedyHashHead(96), {"dim": 96}),
        (lambda: GreedyHashHead(96).to(torch.bfloat16), {"dim": 96}),
        (lambda: GreedyHashHead(96).requires_grad_(False), {"dim": 96}),
    ],
)
def test_arguments_are_read_and_proved(make_head: Callable[[], nn.Module], kwargs: dict[str, Any]) -> None:
    head = make_head()
    dtype = next(head.parameters()).dtype
    spec, source = store_source(head, torch.zeros(2, 96, dtype=dtype), in_features=96, embed_dim=None)
    assert spec["kwargs"] == kwargs
    with skip_init():
        rebuilt = construct_code(spec, source, where="folder/head_code.py")
    for (name, one), (other_name, other) in zip(head.named_parameters(), rebuilt.named_parameters(), strict=True):
        assert (name, one.shape, one.dtype, one.requires_grad) == (
            other_name, other.shape, other.dtype, other.requires_grad
        )  # fmt: skip


def test_an_argument_that_is_kept_nowhere_is_asked_for(users_module: Callable[..., ModuleType]) -> None:
    module = users_module(
        known="""
        import torch.nn as nn
        class Head(nn.Module):
            def __init__(self, dim, embed, share):
                super().__init__()
                self.fc = nn.Linear(dim, int(dim * share))
            def forward(self, x):
                return self.fc(x) if x.sum() > 0 else -self.fc(x)
        """
    )
    head = module.Head(96, 1, 0.25)
    with pytest.raises(HeadError, match=r"'embed' .*kept nowhere.*@register_head"):
        store(head, (96,))
    head = register_head("tests/kept-nowhere")(module.Head)(96, 1, 0.25)
    assert store(head, (96,))[0]["kwargs"] == {"dim": 96, "embed": 1, "share": 0.25}


def test_a_head_that_was_loaded_is_stored_again_byte_for_byte() -> None:
    head = DomainAdversarialHead(96, alpha=0.3)
    spec, source = store(head, (96,))
    rebuilt = construct_code(spec, source, where="folder/head_code.py")
    assert store(rebuilt, (96,)) == (spec, source)
    assert store(copy.deepcopy(rebuilt), (96,)) == (spec, source)


def test_python_finds_the_source_of_a_rebuilt_head() -> None:
    spec, source = store(GreedyHashHead(96), (96,))
    rebuilt = construct_code(spec, source, where="folder/head_code.py")
    assert inspect.getsource(type(rebuilt)) == inspect.getsource(GreedyHashHead)
    assert sys.modules[type(rebuilt).__module__].GreedyHashHead is type(rebuilt)


# It is refused


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("import acme_tools", "line 3, imports acme_tools"),
        ("from acme_tools import f", "imports acme_tools"),
        ("from .acme_tools import f", r"imports \.acme_tools"),
        ("def f():\n    import acme_tools", "line 4, imports acme_tools"),
        ("try:\n    import xformers.ops\nexcept ImportError:\n    pass", "imports xformers.ops"),
    ],
)
def test_a_file_that_does_not_stand_alone_is_refused_with_the_line(
    line: str, reason: str, users_module: Callable[..., ModuleType]
) -> None:
    head = """
import torch.nn as nn
{line}
class Head(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc = nn.Linear(dim, 4)
    def forward(self, x):
        return self.fc(x) if x.sum() > 0 else -self.fc(x)
"""
    name = f"apart{abs(hash(line))}"
    module = users_module(
        **{f"acme_pack__{name}": head.replace("{line}", line), "acme_pack____init__": ""},
        acme_tools="def f(): pass",
        acme_pack__acme_tools="def f(): pass",
    )
    with pytest.raises(HeadError, match=reason):
        store(module.Head(96), (96,))


def test_where_torch_is_installed_does_not_matter(
    users_module: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"purelib": "/nowhere", "platlib": "/nowhere"})
    monkeypatch.setattr("site.getsitepackages", list)
    assert store(GreedyHashHead(96), (96,))[0]["kwargs"] == {"dim": 96}


def _in_a_function() -> nn.Module:
    class Local(nn.Module):
        pass

    return Local()


def _without_source() -> nn.Module:
    space: dict[str, Any] = {"__name__": "__nowhere__", "nn": nn}
    sys.modules["__nowhere__"] = ModuleType("__nowhere__")
    exec("class Typed(nn.Module):\n    def forward(self, x):\n        return x", space)
    return space["Typed"]()


def _with_another_forward() -> nn.Module:
    head = GreedyHashHead(96)
    head.forward = lambda x: head.hash_fc(x).abs().sign()  # type: ignore[method-assign]
    return head


def _with_a_lambda() -> nn.Module:
    head = DomainAdversarialHead(96)
    head.alpha = lambda: 0.5
    return head


def _hidden_number() -> nn.Module:
    head = DomainAdversarialHead(96)
    head.alpha = torch.tensor(0.4)  # not JSON: the default is tried, and found out by the input's gradient
    return head


@pytest.mark.parametrize(
    ("make_head", "reason"),
    [
        (_in_a_function, "inside a function"),
        (_without_source, "no file of its own"),
        (_with_another_forward, "gives another head"),
        (_with_a_lambda, "gives another head|fails"),
        (_hidden_number, "another head: .*gradient"),
        (lambda: GreedyHashHead(96, nbit=17), r"another head: \S+ is torch.float32 .*@register_head"),
        (lambda: nn.Sequential(nn.Linear(96, 4), GreedyHashHead(4)), "Put the parts into a class of your own"),
    ],
)
def test_a_head_that_cannot_come_back_as_code_is_refused(make_head: Callable[[], nn.Module], reason: str) -> None:
    with pytest.raises(HeadError, match=reason):
        store(make_head(), (96,))


def test_a_class_that_was_replaced_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    head = GreedyHashHead(96)
    monkeypatch.setattr(heads_in_the_wild, "GreedyHashHead", nn.Linear)
    with pytest.raises(HeadError, match="was replaced"):
        store(head, (96,))


SPEC = {"form": "code", "file": "head_code.py", "class": "Head", "kwargs": {}, "frozen": []}
FINE = "from torch import nn\nclass Head(nn.Module):\n    pass\n"


def spec_of(source: str, **changes: Any) -> dict[str, Any]:
    return {**SPEC, "sha256": hashlib.sha256(source.encode()).hexdigest(), **changes}


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("x = 1\n1 / 0\n", r"ZeroDivisionError: division by zero \(line 2\)"),
        ("def broken(:\n", "SyntaxError"),
        ("import a_package_that_nobody_has\n", "needs the package 'a_package_that_nobody_has'"),
        ("raise SystemExit(3)\n", "SystemExit"),
        ("Head = 5\n", "no nn.Module of the name 'Head'"),
        (FINE.replace("pass", "def __init__(self):\n        raise KeyError('k')"), r"KeyError: 'k' \(line 4\)"),
    ],
)
def test_code_that_fails_is_a_head_error_that_names_the_file(source: str, reason: str) -> None:
    before = set(sys.modules)
    with pytest.raises(HeadError, match=reason) as refusal:
        construct_code(spec_of(source), source, where="org/repo@c0ffee/head_code.py")
    assert "org/repo@c0ffee/head_code.py" in str(refusal.value)
    if "Head" not in source:
        assert set(sys.modules) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"file": "../head_code.py"},
        {"class": "os.system"},
        {"kwargs": [1]},
        {"sha256": None},
        {"dtype": "nn"},
        {"dtype": ["float32"]},
        {"frozen": 5},
        {"sha256": "0" * 64},
    ],
)
def test_a_spec_that_no_save_writes_runs_nothing(changes: dict[str, Any], tmp_path: Path) -> None:
    source = f"open({str(tmp_path / 'ran')!r}, 'w')\n" + FINE
    with pytest.raises(HeadError, match=r"config\.head|not the code"):
        construct_code(spec_of(source, **changes), source, where="head_code.py")
    assert not (tmp_path / "ran").exists()


def test_two_loads_of_one_file_run_it_once() -> None:
    counting = "def __init__(self):\n        super().__init__()\n        COUNT.append(1)"
    source = FINE.replace("pass", counting) + "COUNT = []\n"
    heads = [construct_code(spec_of(source), source, where=f"copy_{n}/head_code.py") for n in range(2)]
    assert type(heads[0]) is type(heads[1])
    assert sys.modules[type(heads[0]).__module__].COUNT == [1, 1]


def test_the_refusal_says_what_where_and_how_to_allow_it() -> None:
    error = refuse_code(spec_of(FINE), repo="org/eyes", revision="c0ffee")
    assert isinstance(error, HeadError)
    for part in ("org/eyes", "c0ffee", "head_code.py", "'Head'", "trust_remote_code=True", "custom_head=", "Read"):
        assert part in str(error)
    assert "None" not in str(refuse_code(spec_of(FINE), repo="folder", revision=None))
