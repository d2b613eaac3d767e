"""One safetensors file: what we write is what the reference reads, and what anybody wrote is read or refused."""

import gc
import json
import os
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_timm_tower.files.safetensors_layout import write_aligned
from hf_timm_tower.files.safetensors_read import read_aligned
from hf_timm_tower.files.ties import same_bits
from hf_timm_tower.reader.errors import FolderError, FormatError, WeightsError

DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.complex64, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16,
    torch.uint32, torch.uint64,
]  # fmt: skip


def some_tensors() -> dict[str, Tensor]:
    """Every dtype in odd and even sizes, and every shape that is easy to get wrong."""
    tensors = {}
    for dtype in DTYPES:
        for size in (1, 3, 64):
            raw = torch.randint(0, 2, (size * dtype.itemsize,), dtype=torch.uint8)
            tensors[f"{dtype}.{size}"] = raw.view(dtype)
    tensors |= {
        "scalar": torch.tensor(3),
        "empty": torch.empty(0, 3),
        "expanded": torch.randn(1, 4).expand(3, 4),
        "transposed": torch.randn(5, 7).t(),
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "strided": torch.randn(10)[::3],
        "slice": torch.randn(9)[1:8],
        "parameter": torch.nn.Parameter(torch.randn(33)),
        "nan": torch.tensor([float("nan"), -0.0, float("-inf")]),
        "naïve key/ü": torch.ones(2),
    }
    return tensors


def write_raw(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def described(dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_the_reference_reader_and_ours_get_the_same_bits(tmp_path: Path) -> None:
    tensors = some_tensors()
    path = tmp_path / "x.safetensors"
    write_aligned(path, tensors)
    reference, ours = load_file(path), read_aligned(path)
    assert reference.keys() == ours.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert same_bits(reference[key], tensor), key
        assert same_bits(ours[key], tensor), key
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses a file without it


def test_a_lazily_conjugated_tensor_is_written_as_it_reads(tmp_path: Path) -> None:
    tensor = torch.tensor([1 + 2j, 3 - 4j])
    write_aligned(tmp_path / "x", {"conj": tensor.conj(), "imag": tensor.conj().imag})
    read = read_aligned(tmp_path / "x")
    assert read["conj"].tolist() == [1 - 2j, 3 + 4j]
    assert read["imag"].tolist() == [-2.0, 4.0]


@pytest.mark.parametrize("metadata", [None, {}])
def test_a_file_without_tensors_is_a_valid_file(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    write_aligned(tmp_path / "x", {}, metadata)
    assert load_file(tmp_path / "x") == read_aligned(tmp_path / "x") == {}


def test_another_writers_file_is_read_into_aligned_memory(tmp_path: Path) -> None:
    tensors = {key: tensor.detach().contiguous() for key, tensor in some_tensors().items()}
    save_file(tensors, tmp_path / "x")
    ours = read_aligned(tmp_path / "x")
    assert ours.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert same_bits(ours[key], tensor), key
        assert ours[key].data_ptr() % 64 == 0, key


def test_every_tensor_is_aligned_in_memory_and_most_of_the_file_is_mapped_not_copied(tmp_path: Path) -> None:
    tensors = some_tensors() | {"big": torch.randn(1000, 16)}
    path = tmp_path / "x"
    write_aligned(path, tensors)
    ours = read_aligned(path)
    assert [key for key, tensor in ours.items() if tensor.data_ptr() % 64] == []
    if os.path.exists("/proc/self/maps"):
        ranges = [
            [int(end, 16) for end in line.split()[0].split("-")]
            for line in Path("/proc/self/maps").read_text().splitlines()
            if line.endswith(str(path))
        ]
        mapped = {k for k, t in ours.items() if any(begin <= t.data_ptr() < end for begin, end in ranges)}
        whole = {k for k, t in tensors.items() if t.numel() and t.numel() * t.element_size() % 64 == 0}
        assert whole <= mapped


def test_each_tensor_owns_its_storage_so_that_other_writers_save_it_alone(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(16), "b": torch.randn(160), "c": torch.randn(3)}
    write_aligned(tmp_path / "x", tensors)
    ours = read_aligned(tmp_path / "x")
    assert {key: tensor.untyped_storage().nbytes() for key, tensor in ours.items()} == {"a": 64, "b": 640, "c": 12}
    save_file(ours, tmp_path / "again")  # refuses tensors that share storage


def test_equal_tensors_give_equal_bytes_whatever_the_order_of_the_keys(tmp_path: Path) -> None:
    tensors = some_tensors()
    write_aligned(tmp_path / "a", tensors, {"x": "1", "y": "2"})
    write_aligned(tmp_path / "b", dict(reversed(tensors.items())), {"y": "2", "x": "1"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_files_mode_follows_the_umask(tmp_path: Path) -> None:
    for umask in (0o022, 0o027):
        before = os.umask(umask)
        try:
            write_aligned(tmp_path / "x", {"a": torch.ones(1)})
        finally:
            os.umask(before)
        assert (tmp_path / "x").stat().st_mode & 0o777 == 0o666 & ~umask


def test_editing_loaded_tensors_never_reaches_the_file(tmp_path: Path) -> None:
    write_aligned(tmp_path / "x", {"a": torch.zeros(4096), "b": torch.zeros(3)})
    before = (tmp_path / "x").read_bytes()
    for tensor in read_aligned(tmp_path / "x").values():
        tensor += 1
    gc.collect()
    assert (tmp_path / "x").read_bytes() == before
    assert read_aligned(tmp_path / "x")["a"].sum() == 0


def test_loaded_tensors_outlive_a_save_over_their_file_and_its_removal(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_aligned(path, {"a": torch.full((100_000,), 1.0)})
    ours = read_aligned(path)
    write_aligned(path, {"a": torch.full((100_000,), 2.0)})
    assert ours["a"].unique().tolist() == [1.0]
    path.unlink()
    assert ours["a"].unique().tolist() == [1.0]


def test_writing_through_a_link_leaves_what_it_points_to_alone(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"blob")
    (tmp_path / "x").symlink_to("blob")
    write_aligned(tmp_path / "x", {"a": torch.ones(1)})
    assert (tmp_path / "blob").read_bytes() == b"blob"
    assert read_aligned(tmp_path / "x")["a"].tolist() == [1.0]


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.zeros(2, dtype=torch.complex128), "complex128"),
        (torch.zeros(2, device="meta"), "meta"),
        (torch.eye(3).to_sparse(), "to_dense"),
        (3, "int"),
    ],
)
def test_what_no_file_can_hold_is_refused_by_key_and_nothing_is_written(
    tmp_path: Path, tensor: Tensor, said: str
) -> None:
    with pytest.raises(WeightsError, match=f"bad.*{said}"):
        write_aligned(tmp_path / "x", {"good": torch.ones(1), "bad": tensor})
    assert list(tmp_path.iterdir()) == []


def test_system_errors_name_the_path(tmp_path: Path) -> None:
    for bad in (tmp_path / "missing", tmp_path):
        with pytest.raises((FolderError, FormatError), match=str(bad)):
            read_aligned(bad)
    with pytest.raises(FolderError, match="missing"):
        write_aligned(tmp_path / "missing" / "x", {})


def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    write_aligned(tmp_path / "x", {"a": torch.ones(64), "b": torch.ones(3), "c": torch.tensor(1)})
    whole = (tmp_path / "x").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(FormatError, match="cut"):
            read_aligned(tmp_path / "cut")
    (tmp_path / "long").write_bytes(whole + b"\0")
    with pytest.raises(FormatError, match="nothing describes"):
        read_aligned(tmp_path / "long")


BAD_HEADERS: dict[str, tuple[object, bytes]] = {
    "not JSON": (b"{", b""),
    "not an object": (b"[]", b""),
    "not UTF-8": (b'{"\xff": 1}', b""),
    "deep": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b""),
    "key twice": (b'{"a":%s,"a":%s}' % ((json.dumps(described()).encode(),) * 2), bytes(4)),
    "not described": ({"a": 1}, b""),
    "field missing": ({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)),
    "field unknown": ({"a": described() | {"compressed": True}}, bytes(4)),
    "dtype unknown": ({"a": described(dtype="F128")}, bytes(4)),
    "dtype a list": ({"a": described(dtype=["F32"])}, bytes(4)),
    "shape negative": ({"a": described(shape=[-1])}, bytes(4)),
    "shape of truth values": ({"a": described(shape=[True])}, bytes(4)),
    "shape of floats": ({"a": described(shape=[1.0])}, bytes(4)),
    "shape overflows 64 bits": ({"a": described(shape=[2**32, 2**32 + 1], offsets=[0, 4])}, bytes(4)),
    "strides overflow": ({"a": described(shape=[0, 2**62, 2**62], offsets=[0, 0])}, b""),
    "rank absurd": ({"a": described(shape=[1] * 100)}, bytes(4)),
    "size differs": ({"a": described(shape=[2])}, bytes(4)),
    "offsets reversed": ({"a": described(offsets=[4, 0])}, bytes(4)),
    "offsets negative": ({"a": described(offsets=[-4, 0])}, bytes(4)),
    "offsets of three": ({"a": described(offsets=[0, 4, 4])}, bytes(4)),
    "outside": ({"a": described(offsets=[4, 8])}, bytes(4)),
    "past the end": ({"a": described(shape=[100], offsets=[0, 400])}, bytes(4)),
    "overlap": ({"a": described(shape=[2], offsets=[0, 8]), "b": described(offsets=[4, 8])}, bytes(8)),
    "hole": ({"a": described(), "b": described(offsets=[8, 12])}, bytes(12)),
    "hole at the start": ({"a": described(offsets=[4, 8])}, bytes(8)),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, b""),
    "huge integer": (b'{"a":' + b"9" * 10_000 + b"}", b""),
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_a_wrong_header_is_refused_naming_the_file(tmp_path: Path, name: str) -> None:
    path = write_raw(tmp_path / "bad.safetensors", *BAD_HEADERS[name])
    with pytest.raises(FormatError, match=r"bad\.safetensors"):
        read_aligned(path)


def test_a_header_that_claims_gigabytes_is_refused_by_its_length(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 2**33))
        file.truncate(2**34)  # a sparse file: takes no room
    with pytest.raises(FormatError, match="header claims"):
        read_aligned(path)


def test_what_is_not_a_regular_file_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FormatError, match="regular"):
        read_aligned(tmp_path / "pipe")


VALID = {"trunk.w": torch.arange(32.0), "trunk.n": torch.tensor(7), "head.b": torch.ones(3, dtype=torch.bfloat16)}


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_mutated_file_gives_tensors_or_our_error_and_agrees_with_the_reference(
    tmp_path: Path, data: st.DataObject
) -> None:
    path = tmp_path / "x"
    write_aligned(path, VALID)
    content = bytearray(path.read_bytes())
    header_end = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, header_end - 1))
        action = data.draw(st.sampled_from(["set", "delete", "insert"]))
        structural = st.sampled_from(b'0129{}[],":FIBU-e').map(lambda byte: bytes([byte]))
        piece = data.draw(st.binary(min_size=1, max_size=1) | structural)
        if action == "set":
            content[position : position + 1] = piece
        elif action == "delete":
            del content[position : position + 1]
        else:
            content[position:position] = piece
    path.write_bytes(content)
    try:
        ours = read_aligned(path)
    except (FormatError, FolderError):
        return
    reference = load_file(path)  # whatever we take, the reference takes, with the same values
    assert reference.keys() == ours.keys()
    assert all(same_bits(reference[key], tensor) for key, tensor in ours.items())


SIZES = st.integers(-1, 5) | st.sampled_from([64, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 2**70])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    header=st.dictionaries(
        st.sampled_from(["a", "b", "c", "__metadata__", ""]),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "U8", "BOOL", "C64", "F4", "I64"]),
                "shape": st.lists(SIZES, max_size=3),
                "data_offsets": st.lists(SIZES | st.integers(0, 40), max_size=3),
            }
        ),
        max_size=3,
    ),
    size=st.integers(0, 40),
)
def test_any_header_of_the_right_form_gives_tensors_or_our_error(
    tmp_path: Path, header: dict[str, object], size: int
) -> None:
    path = write_raw(tmp_path / "x", header, bytes(size))
    try:
        ours = read_aligned(path)
    except FormatError:
        return
    assert sum(tensor.numel() * tensor.element_size() for tensor in ours.values()) == size
