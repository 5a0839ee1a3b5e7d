"""Safetensors files made to break a reader: each is refused by a StoreError that says why."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paretofuse.engine.errors import StoreError
from paretofuse.engine.store.safetensors_file import SafetensorsFile
from tests.support.stores import check_message


def with_header(header: bytes | dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


FOUR = b"1234"


ATTACKS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes"),
    "seven bytes": (b"1234567", "7 bytes"),
    "no header": (struct.pack("<Q", 0), "does not begin"),
    "truncated header": (with_header(b'{"t":', length=500), "truncated"),
    "huge header length": (with_header({}, length=2**63), "header"),
    "largest header length": (with_header({}, length=2**64 - 1), "header"),
    "header over the limit": (with_header({}, length=100_000_001), "header"),
    "pickle": (b"\x80\x04\x95" + b"\0" * 40, "header"),
    "not JSON": (with_header(b"{'t': 1}"), "damaged"),
    "unfinished JSON": (with_header(b'{"t": {"dtype"'), "damaged"),
    "list": (with_header(b"[]"), "does not begin"),
    "leading space": (with_header(b" {}"), "does not begin"),
    "bad UTF-8": (with_header(b'{"\xff\xfe": 1}'), "damaged"),
    "deep nesting": (with_header(b'{"t":' + b"[" * 500_000 + b"]" * 500_000 + b"}"), "damaged"),
    "deep objects": (with_header(b'{"t":' * 200_000 + b"1" + b"}" * 200_000), "damaged"),
    "long integer": (with_header(b'{"t":' + b"9" * 10_000 + b"}"), "damaged"),
    "NaN": (with_header(b'{"t":NaN}'), "damaged"),
    "duplicate names": (
        with_header(
            b'{"t":' + json.dumps(entry()).encode() + b',"t":' + json.dumps(entry()).encode() + b"}", FOUR
        ),
        "'t' appears twice",
    ),
    "duplicate keys": (
        with_header(b'{"t":{"dtype":"F32","dtype":"U8","shape":[1],"data_offsets":[0,4]}}', FOUR),
        "'dtype' appears twice",
    ),
    "entry no object": (with_header({"t": 5}), "should have"),
    "missing key": (with_header({"t": {"dtype": "F32", "shape": [1]}}, FOUR), "should have"),
    "further key": (with_header({"t": entry(strides=[1])}, FOUR), "should have"),
    "unknown dtype": (with_header({"t": entry("F31")}, FOUR), "'F31'"),
    "dtype no string": (with_header({"t": entry(["F32"])}, FOUR), "dtype"),
    "wrong dtype": (with_header({"t": entry("F16")}, FOUR), "F16"),
    "wrong shape": (with_header({"t": entry(shape=[2])}, FOUR), "takes 8"),
    "negative shape": (with_header({"t": entry(shape=[-1])}, FOUR), "shape"),
    "two negative sizes": (with_header({"t": entry(shape=[-1, -1])}, FOUR), "shape"),
    "float shape": (with_header({"t": entry(shape=[1.0])}, FOUR), "shape"),
    "boolean shape": (with_header({"t": entry(shape=[True])}, FOUR), "shape"),
    "shape no list": (with_header({"t": entry(shape=1)}, FOUR), "shape"),
    "overflowing shape": (with_header({"t": entry(shape=[2**62, 4])}, FOUR), "takes"),
    "sizes past 64 bits": (with_header({"t": entry(shape=[2**64, 0], offsets=(0, 0))}), "shape"),
    "negative offset": (with_header({"t": entry(offsets=(-4, 0))}, FOUR), "offsets"),
    "reversed offsets": (with_header({"t": entry(offsets=(4, 0))}, FOUR), "takes 4"),
    "three offsets": (with_header({"t": entry(offsets=(0, 4, 4))}, FOUR), "offsets"),
    "offsets past the end": (with_header({"t": entry(offsets=(0, 4))}, b"123"), "1 bytes are missing"),
    "offsets far away": (with_header({"t": entry(offsets=(2**62, 2**62 + 4))}, FOUR), "hole"),
    "overlap": (with_header({"t": entry(), "u": entry()}, FOUR), "overlaps"),
    "partial overlap": (with_header({"t": entry(), "u": entry(offsets=(2, 6))}, FOUR * 2), "overlaps"),
    "hole": (with_header({"t": entry(), "u": entry(offsets=(8, 12))}, FOUR * 3), "hole"),
    "bytes behind": (with_header({"t": entry()}, FOUR + b"5"), "too many"),
    "twice among many": (
        with_header(b"{" + b",".join(b'"%d":0' % (i % 300_000) for i in range(300_001)) + b"}"),
        "'0' appears twice",
    ),
    "metadata no object": (with_header({"__metadata__": 5}), "metadata"),
    "metadata no strings": (with_header({"__metadata__": {"a": 1}}), "metadata"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_files(tmp_path: Path, name: str) -> None:
    content, words = ATTACKS[name]
    path = tmp_path / "attack.safetensors"
    path.write_bytes(content)
    with pytest.raises(StoreError) as caught:
        SafetensorsFile(path)
    check_message(caught.value, path, words)


@given(data=st.data())
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_files_open_or_give_a_store_error(tmp_path: Path, data: st.DataObject) -> None:
    header = {"__metadata__": {"a": "b"}, "t": entry(), "u": entry("BF16", (2, 2), (4, 12))}
    content = bytearray(with_header(header, bytes(12)))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(content)
    try:
        file = SafetensorsFile(path)
    except StoreError:
        return
    for view in file.tensors.values():
        assert view.offset + view.nbytes <= len(content)
        assert view.data.size == view.nbytes


@pytest.mark.parametrize("kind", ["missing", "directory"])
def test_unreadable_files(tmp_path: Path, kind: str) -> None:
    path = tmp_path if kind == "directory" else tmp_path / "none.safetensors"
    with pytest.raises(StoreError, match="cannot be read"):
        SafetensorsFile(path)
