"""A head becomes JSON and comes back; JSON from strangers becomes a head or a GraphError, and nothing else."""

import base64
import copy
import functools
import json
import random
import time
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from more_heads import CODE, STORABLE, AutocastRegions, FrozenNorm, LearnedGeM, SinusPositions, TiedAutoencoder
from packaging.version import Version
from torch import nn

from hf_timm_tower.heads.to_graph import to_graph
from hf_timm_tower.heads.verify import verify_head
from hf_timm_tower.reader import graph_sizes
from hf_timm_tower.reader.errors import GraphError, HeadError
from hf_timm_tower.reader.graph_head import GraphHead, construct
from hf_timm_tower.reader.skip_init import Budget

SHAPES = {"vector": (96,), "map": (96, 5, 5), "tokens": (101, 64)}


def made(entry: tuple[Any, tuple[Any, ...], str]) -> tuple[nn.Module, torch.Tensor]:
    cls, args, form = entry
    torch.manual_seed(0)
    return cls(*args), torch.zeros(2, *SHAPES[form])


def name(entry: tuple[Any, tuple[Any, ...], str]) -> str:
    return f"{entry[0].__name__}-{'-'.join(map(str, entry[1]))}"


class CustomHead(nn.Module):
    def __init__(self, in_features: int, embed_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, embed_dim)
        self.drop = nn.Dropout(0.1)
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(self.drop(self.linear(x)))


@pytest.mark.parametrize("entry", STORABLE, ids=name)
def test_head_comes_back_from_json(entry: Any) -> None:
    head, example = made(entry)
    graph = to_graph(head, example)
    rebuilt = construct(json.loads(json.dumps(graph, sort_keys=True)))
    verify_head(head, rebuilt, example)
    rebuilt.load_state_dict(head.state_dict())
    assert to_graph(rebuilt, example) == graph


@pytest.mark.parametrize("entry", CODE, ids=name)
def test_code_is_refused(entry: Any) -> None:
    head, example = made(entry)
    if name(entry) == "Checkpointed-96-False" and Version(torch.__version__) < Version("2.8"):
        pytest.skip("its operations can be recorded there")
    with pytest.raises(HeadError):
        verify_head(head, construct(to_graph(head, example)), example)


def test_refusal_names_the_line() -> None:
    class Branching(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(GraphError, match=r"(Branching\.)?forward.*x\.sum\(\) > 0"):
        to_graph(Branching(), torch.zeros(2, 4))


def test_describing_leaves_head_and_random_state_alone() -> None:
    head = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4)).train()
    head[0].eval()
    head[0].weight.grad = torch.ones_like(head[0].weight)
    whole = nn.Sequential(head, CustomHead(4, 3))
    before = copy.deepcopy(head.state_dict())
    states = torch.get_rng_state(), random.getstate()
    to_graph(whole, torch.zeros(2, 8))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert all(torch.equal(value, before[key]) for key, value in head.state_dict().items())
    assert (head.training, head[0].training, head[1].training) == (True, False, True)
    assert torch.equal(head[0].weight.grad, torch.ones_like(head[0].weight))


def test_layers_come_back_as_themselves() -> None:
    rebuilt = construct(to_graph(CustomHead(8, 4), torch.zeros(2, 8)))
    assert type(rebuilt.linear) is nn.Linear
    assert type(rebuilt.drop) is nn.Dropout
    assert type(construct(to_graph(nn.Linear(8, 4), torch.zeros(2, 8)))) is nn.Linear


def test_graph_follows_changes_to_the_rebuilt_head() -> None:
    head, example = CustomHead(8, 4), torch.zeros(2, 8)
    rebuilt = construct(to_graph(head, example))
    rebuilt.load_state_dict(head.state_dict())
    rebuilt.drop.p = 0.7
    rebuilt.linear.bias.requires_grad_(False)
    again = construct(to_graph(rebuilt, example))
    assert again.drop.p == 0.7
    assert not again.linear.bias.requires_grad
    verify_head(rebuilt, again, example)


def test_head_that_minds_its_size_refuses_another_and_one_that_does_not_takes_it() -> None:
    fixed = construct(to_graph(SinusPositions(101, 64), torch.zeros(2, 101, 64)))
    with pytest.raises(HeadError, match=r"\[B, 101, 64\]"):
        fixed(torch.zeros(2, 102, 64))
    head = LearnedGeM(96).eval()
    free = construct(to_graph(head, torch.zeros(2, 96, 5, 5)))
    free.load_state_dict(head.state_dict())
    wide = torch.randn(3, 96, 9, 4)
    assert torch.equal(free.eval()(wide), head(wide))
    with pytest.raises(HeadError):
        free(torch.zeros(2, 95, 5, 5))


def test_ties_survive_loading_by_assignment() -> None:
    head, example = TiedAutoencoder(96), torch.zeros(2, 96)
    with torch.device("meta"):
        rebuilt = construct(to_graph(head, example))
    weights = {key: value.detach().clone() for key, value in head.state_dict().items()}
    rebuilt.load_state_dict(weights, assign=True)
    assert rebuilt.twin.weight is rebuilt.encode.weight
    verify_head(head, rebuilt, example)


def test_constants_survive_the_meta_device_and_keep_their_dtype() -> None:
    head, example = SinusPositions(101, 64).eval(), torch.zeros(2, 101, 64)
    with torch.device("meta"):
        rebuilt = construct(to_graph(head, example))
    rebuilt.load_state_dict({key: value.clone() for key, value in head.state_dict().items()}, assign=True)
    x = torch.randn(3, 101, 64)
    assert torch.equal(rebuilt.eval()(x), head(x))


def test_dtypes_written_as_those_of_the_input_follow_it() -> None:
    class Zeros(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x) + torch.zeros(x.size(0), 4, dtype=x.dtype, device=x.device)

    head = Zeros()
    rebuilt = construct(to_graph(head, torch.zeros(2, 8)))
    rebuilt.load_state_dict(head.state_dict())
    x = torch.randn(3, 8).bfloat16()
    assert torch.equal(rebuilt.bfloat16()(x), head.bfloat16()(x))


def test_autocast_regions_hold_inside_autocast() -> None:
    head = AutocastRegions(96).eval()
    rebuilt = construct(to_graph(head, torch.zeros(2, 96))).eval()
    rebuilt.load_state_dict(head.state_dict())
    x = torch.randn(3, 96)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = rebuilt(x), head(x)
    assert [tensor.dtype for tensor in found] == [torch.float32, torch.bfloat16]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_modules_held_in_one_mode_stay_there() -> None:
    rebuilt = construct(to_graph(FrozenNorm(96), torch.zeros(2, 96)))
    assert not rebuilt.train().norm.training
    assert rebuilt.fc.training


def test_rebuilt_head_can_be_copied_and_compiled() -> None:
    head = CustomHead(8, 4).eval()
    rebuilt = construct(to_graph(head, torch.zeros(2, 8))).eval()
    rebuilt.load_state_dict(head.state_dict())
    x = torch.randn(3, 8)
    assert torch.equal(copy.deepcopy(rebuilt)(x), head(x))
    # torch 2.7's dynamo breaks the graph at contextlib.ExitStack; the numbers are the same
    in_one = Version(torch.__version__) >= Version("2.8")
    compiled = torch.compile(rebuilt, backend="eager", fullgraph=in_one)
    assert torch.equal(compiled(x), head(x))


# --- graphs from strangers


@functools.cache
def small_graph_text() -> str:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
            self.gain = nn.Parameter(torch.ones(4))
            self.twin = self.net[0]
            self.register_buffer("shift", torch.ones(4), persistent=False)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            y = torch.cat([self.net(x), self.twin(x) * self.gain + self.shift], dim=-1)
            return {"y": y.view(x.shape[0], 2, 4).mean(1), "z": torch.einsum("bi,bi->b", y, y)}

    return json.dumps(to_graph(Small(), torch.zeros(2, 4)))


def small_graph() -> dict[str, Any]:
    graph: dict[str, Any] = json.loads(small_graph_text())
    return graph


def with_node(node: dict[str, Any]) -> dict[str, Any]:
    graph = small_graph()
    graph["forward"]["nodes"].append(node)
    return graph


def with_module(*modules: dict[str, Any]) -> dict[str, Any]:
    graph = small_graph()
    graph["modules"].extend(modules)
    return graph


def changed(key: str, value: Any) -> dict[str, Any]:
    return {**small_graph(), key: value}


LINEAR = {"in_features": 4, "out_features": 4, "bias": True}
ATTACKS = {
    "not an object": [1, 2],
    "newer version": changed("version", 2),
    "version of another type": changed("version", True),
    "unknown key": changed("code", "import os"),
    "no modules": changed("modules", []),
    "no forward": {key: value for key, value in small_graph().items() if key != "forward"},
    "one mode only": {**{k: v for k, v in small_graph().items() if k != "forward"}, "eval": small_graph()["forward"]},
    "os.system": with_node({"op": "os.system", "in": [{"s": "true"}]}),
    "torch.load": with_node({"op": "torch.load", "in": [{"s": "weights.pt"}]}),
    "torch.from_file": with_node({"op": "torch.from_file", "in": [{"s": "/etc/passwd"}]}),
    "attribute of a tensor": with_node({"op": "Tensor.__class__", "in": ["x"]}),
    "python call": with_node({"op": "Tensor.apply_", "in": ["x"]}),
    "storage": with_node({"op": "Tensor.set_", "in": ["x"]}),
    "hook": with_node({"op": "Tensor.register_hook", "in": ["x"]}),
    "value into Python": with_node({"op": "Tensor.item", "in": ["x"]}),
    "word that no operation takes": with_node({"op": "Tensor.to", "in": ["x", {"s": "cuda:0"}]}),
    "path as a word": with_node({"op": "torch.sum", "in": ["x", {"s": "/etc/passwd"}]}),
    "einsum that is none": with_node({"op": "torch.einsum", "in": [{"s": "__import__('os')"}, "x"]}),
    "device": with_node({"op": "Tensor.to", "in": ["x", {"device": "cuda:7"}]}),
    "forward reference": with_node({"op": "torch.relu", "in": ["%99"]}),
    "reference to itself": with_node({"op": "torch.relu", "in": [f"%{len(small_graph()['forward']['nodes'])}"]}),
    "negative reference": with_node({"op": "torch.relu", "in": ["%-1"]}),
    "tensor that is not there": with_node({"op": "torch.relu", "in": ["$gain.__class__"]}),
    "constant that is not there": with_node({"op": "torch.relu", "in": ["#3"]}),
    "bare word": with_node({"op": "torch.relu", "in": ["self.__dict__"]}),
    "keyword that is none": with_node({"op": "torch.relu", "in": ["x"], "kw": {"__class__": 1}}),
    "call of a part": with_node({"call": "", "in": ["x"]}),
    "call of a method": with_node({"call": "net.forward", "in": ["x"]}),
    "write to a parameter": with_node({"write": "gain", "in": ["x"]}),
    "write to an attribute": with_node({"write": "training", "in": ["x"]}),
    "two kinds of node": with_node({"op": "torch.relu", "call": "net", "in": ["x"]}),
    "huge factory": with_node({"op": "torch.zeros", "in": [10**6, 10**6]}),
    "huge repeat": with_node({"op": "Tensor.repeat", "in": ["x", 10**6, 10**6]}),
    "huge number": with_node({"op": "Tensor.add", "in": ["x", 10**40]}),
    "huge power": with_node({"op": "Tensor.add", "in": ["x", {"n": ["**", "B", 10**9]}]}),
    "formula that is none": with_node({"op": "Tensor.add", "in": ["x", {"n": ["__import__", "os", 1]}]}),
    "unknown layer": with_module({"name": "a", "layer": "torch.hub.load", "args": {}}),
    "layer by attribute": with_module({"name": "a", "layer": "Module.__init__", "args": {}}),
    "argument too many": with_module({"name": "a", "layer": "Linear", "args": {**LINEAR, "device": "cuda"}}),
    "argument too few": with_module({"name": "a", "layer": "Linear", "args": {"in_features": 4}}),
    "argument of another type": with_module({"name": "a", "layer": "Linear", "args": {**LINEAR, "in_features": "os"}}),
    "terabyte layer": with_module({"name": "a", "layer": "Linear", "args": {**LINEAR, "in_features": 2**31}}),
    "terabyte parameter": with_module({"name": "a", "part": True, "params": [["w", [2**20, 2**20], "float32"]]}),
    "terabyte buffer": with_module({"name": "a", "part": True, "buffers": [["w", [2**40], "float32"]]}),
    "overflowing parameter": with_module({"name": "a", "part": True, "params": [["w", [2**40, 2**40], "float32"]]}),
    "endless recurrent layer": with_module(
        {
            "name": "a",
            "layer": "LSTM",
            "args": {
                "input_size": 1, "hidden_size": 1, "num_layers": 2**31, "bias": True, "batch_first": False,
                "dropout": 0.0, "bidirectional": False, "proj_size": 0,
            },
        }
    ),
    "stack of anything": with_module(
        {
            "name": "a",
            "layer": "TransformerEncoder",
            "args": {
                "layer": ["Linear", LINEAR], "num_layers": 2, "norm": None,
                "enable_nested_tensor": True, "mask_check": True,
            },
        }
    ),
    "huge pool": with_module({"name": "a", "layer": "AdaptiveAvgPool2d", "args": {"output_size": [2**20, 2**20]}}),
    "module twice": with_module({"name": "net", "layer": "Identity", "args": {}}),
    "module before its parent": with_module({"name": "a.b", "layer": "Identity", "args": {}}),
    "module inside a layer": with_module({"name": "net.0.x", "layer": "Identity", "args": {}}),
    "module named like a tensor": with_module({"name": "gain", "layer": "Identity", "args": {}}),
    "dunder module": with_module({"name": "__class__", "layer": "Identity", "args": {}}),
    "dunder tensor": with_module({"name": "a", "part": True, "params": [["__dict__", [1], "float32"]]}),
    "dotted tensor": with_module({"name": "a", "part": True, "params": [["b.c", [1], "float32"]]}),
    "tensor twice": with_module({"name": "a", "part": True, "params": [["b", [1], "float32"], ["b", [1], "float32"]]}),
    "unknown dtype": with_module({"name": "a", "part": True, "params": [["b", [1], "object"]]}),
    "negative size": with_module({"name": "a", "part": True, "params": [["b", [-1], "float32"]]}),
    "unknown container": with_module({"name": "a", "container": "ParameterList"}),
    "module that is the head": with_module({"name": "a", "same": ""}),
    "module that holds itself": with_module({"name": "a", "part": True}, {"name": "a.b", "same": "a"}),
    "modules that hold each other": with_module(
        {"name": "a", "part": True},
        {"name": "b", "part": True},
        {"name": "a.x", "same": "b"},
        {"name": "b.x", "same": "a"},
    ),
    "names that double": with_module(
        *({"name": ".".join(["a"] * n + [kind]), **spec}
          for n in range(25)
          for kind, spec in (("a", {"part": True}), ("b", {"same": ".".join(["a"] * (n + 1))})))
    ),
    "deep module": with_module(*({"name": ".".join(["a"] * n), "part": True} for n in range(1, 200))),
    "tie to nothing": changed("ties", [["gain", "__class__"]]),
    "tie of unlike tensors": changed("ties", [["gain", "net.0.weight"]]),
    "frozen that is not there": changed("frozen", ["x"]),
    "dtype of nothing": changed("dtypes", [["__class__", "float32"]]),
    "held that is not there": changed("held", [["os", True, True]]),
    "layout that is none": changed("layouts", [["gain", [0, 0]]]),
    "constant of another size": changed("constants", [{"shape": [4], "dtype": "float32", "data": "AAAA"}]),
    "constant without end": changed("constants", [{"shape": [2**39], "dtype": "float32", "data": ""}]),
    "bool that is none": changed("constants", [{"shape": [1], "dtype": "bool", "data": "Ag=="}]),
    "input without shape": changed("input", {}),
}  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
def test_attack_is_refused(attack: Any) -> None:
    with pytest.raises(GraphError):
        construct(attack)


def test_the_graph_the_attacks_start_from_is_accepted() -> None:
    assert isinstance(construct(small_graph()), GraphHead)


def test_nesting_is_bounded() -> None:
    deep: Any = "x"
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(GraphError, match="nested"):
        construct(with_node({"op": "torch.relu", "in": [deep]}))


def test_weights_are_bounded_before_they_are_allocated() -> None:
    graph = to_graph(CustomHead(1000, 1000), torch.zeros(2, 1000))
    with pytest.raises(GraphError, match="GiB"):
        construct(graph, budget=Budget(4_000_000))
    construct(graph, budget=Budget(4_010_000))


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    if isinstance(value, dict):
        for key, item in value.items():
            found += places(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            found += places(item, (*path, index))
    return found


GRAPHS = [json.loads(json.dumps(to_graph(*made(entry)))) for entry in STORABLE[:40:4]] + [small_graph()]
WORDS = st.sampled_from(
    ["x", "%0", "%1", "%1.0", "$gain", "#0", "", "torch.cat", "Tensor.view", "F.linear", "Linear", "LSTM", "net", "B"]
)
LEAVES = st.none() | st.booleans() | st.integers() | st.integers(-4, 8) | st.floats() | st.text(max_size=6) | WORDS
JSON = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=2))


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_a_changed_graph_is_a_head_or_a_graph_error(data: st.DataObject) -> None:
    graph = copy.deepcopy(data.draw(st.sampled_from(GRAPHS)))
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(places(graph)[1:]))
        parent = graph
        for step in path[:-1]:
            parent = parent[step]
        action = data.draw(st.sampled_from(["replace", "delete", "double"]))
        if action == "replace":
            parent[path[-1]] = data.draw(JSON)
        elif action == "delete":
            del parent[path[-1]]
        elif isinstance(parent, list):
            parent.append(copy.deepcopy(parent[path[-1]]))
    try:
        head = construct(graph, budget=Budget(1 << 26))
    except GraphError:
        return
    assert isinstance(head, nn.Module)
    assert sum(tensor.nbytes for tensor in head.state_dict().values()) <= 1 << 27


# --- what calls make together is bounded when a head runs, before it is made


def run_at_growth(*nodes: dict[str, Any], constants: Any = (), x: torch.Tensor | None = None) -> Any:
    """Run a head of no weights that makes these calls."""
    graph = {
        "version": 1,
        "input": {"shape": [None, 8]},
        "modules": [{"name": "", "part": True}],
        "forward": {"nodes": list(nodes), "output": f"%{len(nodes) - 1}"},
        "constants": [
            {
                "shape": list(tensor.shape),
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "data": base64.b64encode(tensor.numpy().tobytes()).decode(),
            }
            for tensor in constants
        ],
    }
    return construct(graph)(torch.ones(2, 8) if x is None else x)


VECTOR = torch.ones(20_000)
GROWTH: dict[str, Any] = {
    "doubling": ([{"op": "torch.cat", "in": [["x" if not i else f"%{i - 1}"] * 2]} for i in range(40)], []),
    "outer product": ([{"op": "torch.outer", "in": ["#0", "#0"]}], [VECTOR]),
    "Kronecker product": ([{"op": "torch.kron", "in": ["#0", "#0"]}], [VECTOR]),
    "broadcast": ([{"op": "Tensor.unsqueeze", "in": ["#0", 1]}, {"op": "Tensor.add", "in": ["%0", "#0"]}], [VECTOR]),
    "einsum of many": ([{"op": "torch.einsum", "in": [{"s": "a,b,c,d->abcd"}, ["#0"] * 4]}], [VECTOR]),
    "grid": ([{"op": "torch.cartesian_prod", "in": ["#0", "#0", "#0"]}], [VECTOR]),
    "millions of tensors": ([{"op": "torch.tensor_split", "in": ["x", 2**24]}, {"op": "torch.relu", "in": ["x"]}], []),
    "unbind of nothing": ([{"op": "torch.zeros", "in": [[2**30, 0]]}, {"op": "torch.unbind", "in": ["%0"]}], []),
    "repeats told by a tensor": ([{"op": "torch.repeat_interleave", "in": ["#0", "#0"]}], [torch.tensor([2**40])]),
    "bins told by a value": ([{"op": "torch.bincount", "in": ["#0"]}], [torch.tensor([2**40])]),
    "classes told by a value": ([{"op": "F.one_hot", "in": ["#0"]}], [torch.tensor([2**40])]),
    "decompositions": ([{"op": "linalg.svd", "in": ["#0"]}] * 3000, [torch.ones(500, 500)]),
    "copies of a view": (
        [{"op": "Tensor.expand", "in": ["x", 2**20, 2, 8]}, {"op": "Tensor.contiguous", "in": ["%0"]}] * 20,
        [],
    ),
    "copies inside a product": (
        [{"op": "Tensor.expand", "in": ["#0", 2**15, 2**15]}, {"op": "torch.mv", "in": ["%0", "#1"]}],
        [torch.ones(1, 1), torch.ones(2**15)],
    ),
    "copies inside a median": (
        [{"op": "Tensor.expand", "in": ["#0", 2**15, 2**15]}, {"op": "Tensor.median", "in": ["%0"]}], [torch.ones(1, 1)]
    ),
    "sizes told by a tensor": ([{"op": "torch.ones", "in": [["#0", "#0"]]}], [torch.tensor(2**17)]),
    "repeats told by a number": ([{"op": "Tensor.repeat", "in": ["x", "#0", "#0"]}], [torch.tensor(2**17)]),
    "an end told by a tensor": ([{"op": "torch.arange", "in": ["#0"]}], [torch.tensor(2.0**34)]),
}  # fmt: skip


@pytest.mark.parametrize("kind", GROWTH)
def test_a_forward_that_makes_too_much_is_refused_before_it_does(kind: str) -> None:
    nodes, constants = GROWTH[kind]
    with pytest.raises(GraphError, match="intermediate tensors"):
        run_at_growth(*nodes, constants=constants)


LARGE = [{"op": "Tensor.sum", "in": ["x"]}, {"op": "Tensor.repeat", "in": ["%0", 1, 5000, 5000]}]
SQUARE = [{"op": "Tensor.sum", "in": ["x"]}, {"op": "Tensor.repeat", "in": ["%0", 4200, 4200]}]
WORK: dict[str, list[dict[str, Any]]] = {
    "a product of matrices": [*LARGE, {"op": "torch.matmul", "in": ["%1", "%1"]}],
    "distances": [*LARGE, {"op": "torch.cdist", "in": ["%1", "%1", 0.5]}],
    "a pool of a large window": [*LARGE, {"op": "F.max_pool2d", "in": ["%1", 1500, 1]}],
    "singular values inside a norm": [*SQUARE, {"op": "linalg.matrix_norm", "in": ["%1", {"s": "nuc"}]}],
    "a matrix that is inverted": [*SQUARE, {"op": "linalg.inv", "in": ["%1"]}],
    "a large tensor read again and again": LARGE + [{"op": "Tensor.sum", "in": ["%1"]}] * 9000,
    "a convolution": [
        *LARGE,
        {"op": "Tensor.__getitem__", "in": ["%1", {"t": [{"slice": [None, None, None]}, {"slice": [0, 2000, None]}]}]},
        {"op": "Tensor.unsqueeze", "in": ["%2", 0]},
        {"op": "F.conv2d", "in": ["%3", "%3"], "kw": {"padding": 500}},
    ],
}


@pytest.mark.parametrize("kind", WORK)
def test_a_forward_that_computes_too_much_is_refused_before_it_does(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_sizes, "_LEAST", 2**28)  # of bytes there are enough
    monkeypatch.setattr(graph_sizes, "_LEAST_WORK", 2**30)
    with pytest.raises(GraphError, match="computes more than"):
        run_at_growth(*WORK[kind])


def test_layers_count_by_what_they_make() -> None:
    graph = {
        "version": 1,
        "input": {"shape": [None, 1, 8, 8]},
        "modules": [
            {"name": "", "part": True},
            {"name": "up", "layer": "PixelShuffle", "args": {"upscale_factor": 1}},
            {
                "name": "big",
                "layer": "Upsample",
                "args": {
                    "size": None, "scale_factor": 40.0, "mode": "nearest", "align_corners": None,
                    "recompute_scale_factor": None,
                },
            },
        ],
        "forward": {"nodes": [{"call": "big", "in": [at]} for at in ("x", "%0", "%1", "%2")], "output": "%3"},
    }  # fmt: skip
    head = construct(graph)
    with pytest.raises(GraphError, match="intermediate tensors"):
        head(torch.ones(1, 1, 8, 8))


def test_a_call_is_sized_once_for_each_shape_and_honest_growth_is_let_through() -> None:
    nodes = [{"op": "torch.cat", "in": [["x" if not i else f"%{i - 1}"] * 2]} for i in range(8)]
    assert run_at_growth(*nodes).shape == (512, 8)
    masked = [{"op": "Tensor.gt", "in": ["x", 0.5]}, {"op": "Tensor.__getitem__", "in": ["x", "%0"]}]
    assert run_at_growth(*masked).shape == (16,)
    assert run_at_growth({"op": "F.one_hot", "in": ["#0"]}, constants=[torch.tensor([0, 3])]).shape == (2, 4)


BIG = {
    "too many values": with_node({"op": "torch.cat", "in": [["x"] * 9_999 for _ in range(30)]}),
    "too much text": {**small_graph(), "frozen": ["a" * 1999] * 600},
    "too many modules": with_module(*({"name": f"m{i}", "container": "Sequential"} for i in range(3000))),
    "too many calls": {**small_graph(), "forward": {"nodes": [{"call": "net", "in": ["x"]}] * 10_001, "output": "x"}},
    "calls times layers": {
        **with_module(*({"name": f"net.{i}", "layer": "Identity", "args": {}} for i in range(2, 1002))),
        "forward": {"nodes": [{"call": "net", "in": ["x"]}] * 100, "output": "%99"},
    },
}


@pytest.mark.parametrize("graph", BIG.values(), ids=BIG.keys())
def test_graphs_beyond_the_limits_are_refused_in_little_time(graph: Any) -> None:
    began = time.process_time()
    with pytest.raises(GraphError, match=r"more than|at most"):
        construct(graph)
    assert time.process_time() - began < 2
