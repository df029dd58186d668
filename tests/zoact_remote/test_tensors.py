"""The small safetensors reader, against files that the format's own library writes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.numpy import save, save_file
from safetensors.torch import save_file as torch_save

from zoact_remote import InvalidValue
from zoact_remote.tensors import FLOATS, TensorFile, decode, encode, read_tensors

TENSORS = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda name: name != "__metadata__"),
    arrays.arrays(np.float32, arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5)),
    max_size=4,
)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tensors=TENSORS, metadata=st.none() | st.just({"format": "pt"}))
def test_it_reads_what_was_written(
    tmp_path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None
) -> None:
    file = tmp_path / "x.safetensors"
    save_file(tensors, file, metadata)
    found = read_tensors(file)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], tensor)


def test_other_types_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"a": np.zeros(2, np.float16)}, file)
    with pytest.raises(InvalidValue, match="a: must be float32"):
        read_tensors(file)


DTYPES = st.sampled_from(sorted(FLOATS))
WORDS = arrays.arrays(np.uint32, 64)


@settings(max_examples=100)
@given(words=WORDS, dtype=DTYPES)
def test_numbers_are_rounded_as_pytorch_rounds_them(words: np.ndarray, dtype: str) -> None:
    values = words.view(np.float32)
    expected = torch.from_numpy(values.copy()).to(getattr(torch, FLOATS[dtype]))
    found = decode(encode(values, dtype), dtype)
    np.testing.assert_array_equal(found, expected.to(torch.float32).numpy())
    np.testing.assert_array_equal(np.signbit(found[found == 0]), np.signbit(values[found == 0]))


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(1, 6), width=st.integers(0, 5), dtype=DTYPES, data=st.data())
def test_some_rows_are_read(tmp_path: Path, rows: int, width: int, dtype: str, data: st.DataObject) -> None:
    tensors = {name: torch.randn(rows, width).to(getattr(torch, FLOATS[dtype])) for name in "ab"}
    file = tmp_path / "x.safetensors"
    torch_save(tensors, file)
    first = data.draw(st.integers(0, rows))
    last = data.draw(st.integers(first, rows))
    with file.open("rb") as opened:
        found = TensorFile(opened, "x").read("b", first, last)
        assert b"".join(TensorFile(opened, "x").raw("a", 3)) == tensors["a"].view(torch.uint8).numpy().tobytes()
    np.testing.assert_array_equal(found, tensors["b"][first:last].float().numpy())


@pytest.mark.parametrize(
    "entries",
    [
        {"a": [0, 8], "b": [0, 8]},
        {"a": [0, 8], "b": [4, 12]},
        {"a": [0, 8], "b": [12, 20]},
        {"a": [4, 12]},
        {"a": [0, 8]},
    ],
)
def test_tensors_that_overlap_or_leave_gaps_are_refused(tmp_path: Path, entries: dict[str, list[int]]) -> None:
    header = json.dumps({n: {"dtype": "F32", "shape": [2], "data_offsets": at} for n, at in entries.items()}).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(20))
    with pytest.raises(InvalidValue, match=r"x\.safetensors"):
        read_tensors(file)


@pytest.mark.parametrize("length", [0, 4, 8, 20, -1])
def test_a_file_that_was_cut_off_is_refused(tmp_path: Path, length: int) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(save({"a": np.zeros(3, np.float32)})[:length])
    with pytest.raises(InvalidValue, match=r"x\.safetensors"):
        read_tensors(file)


@pytest.mark.parametrize(
    "about",
    [
        {},
        [],
        "F32",
        {"dtype": "F32", "shape": [2], "data_offsets": [0]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 12]},
        {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        {"dtype": "F32", "shape": [-2], "data_offsets": [8, 0]},
        {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2] + [1] * 99, "data_offsets": [0, 8]},
        {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]},
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, about: object) -> None:
    header = json.dumps({"a": about}).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(InvalidValue, match="a: "):
        read_tensors(file)


def test_a_head_that_is_too_long_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(save({"a": np.zeros(3, np.float32)}))
    with path.open("rb") as file:
        head = len(TensorFile(file, "x").head)
        TensorFile(file, "x", head)
        with pytest.raises(InvalidValue, match=f"has a head of {head} bytes, longer than {head - 1}"):
            TensorFile(file, "x", head - 1)
