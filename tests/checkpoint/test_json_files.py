# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import gc
import json
import os
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_npu_quant.checkpoint import json_files, parse_json, read_json
from vllm_npu_quant.checkpoint.json_files import check_depth
from vllm_npu_quant.errors import NpuQuantError

MEBIBYTE = 2**20


def parse(content: bytes | str, **options) -> dict:
    raw = content.encode() if isinstance(content, str) else content
    return parse_json(raw, file="config.json", **options)


@pytest.mark.parametrize(
    ("content", "code", "said"),
    [
        ("", "unreadable-file", "an empty file"),
        ("  \n ", "unreadable-file", "an empty file"),
        ("{", "unreadable-file", "line 1, column 2"),
        ('{"a": 1,}', "unreadable-file", "is not JSON"),
        ('{"a": 1} x', "unreadable-file", "Extra data"),
        ('{"a": 1\n "b": 2}', "unreadable-file", "line 2, column 2"),
        ("[1, 2]", "unreadable-file", "an array"),
        ("null", "unreadable-file", "null"),
        ('"text"', "unreadable-file", "'text'"),
        ("17", "unreadable-file", "17"),
        ('{"a": 1e999}', "unreadable-file", "too large"),
        ('{"a": -1e999}', "unreadable-file", "too large"),
        ('{"a": ' + "1" * 5000 + "}", "unreadable-file", "4300 digits"),
        ('{"a": "\\ud800"}', "unreadable-file", "surrogate"),
        ('{"\\uDFFF": 1}', "unreadable-file", "surrogate"),
        ('{"a": "\n"}', "unreadable-file", "control character"),
        (b'{"a": "\xff"}', "unreadable-file", "byte 0xff at offset 7"),
        ('\ufeff{"a": 1}', "unreadable-file", "byte order mark"),
        ('{"a": 1}'.encode("utf-16"), "unreadable-file", "UTF-16"),
        ("<!DOCTYPE html><html>", "unreadable-file", "a web page"),
        (b"\x1f\x8b\x08\x00\x00", "unreadable-file", "a compressed file"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0", "unreadable-file", "git lfs pull"),
        ('{"a": 1, "a": 2}', "bad-config", "two different values"),
        ('{"a": 1, "a": 1}', "bad-config", "the same value both times"),
        ('{"q": {"groups": [{}, {"bits": 4, "bits": 8}]}}', "bad-config", "q.groups.1.bits"),
        ('{"a": 1, "b": 1, "a": 2, "b": 2}', "bad-config", "and 1 more keys"),
    ],
)
def test_refused(content: bytes | str, code: str, said: str) -> None:
    with pytest.raises(NpuQuantError) as caught:
        parse(content)
    assert caught.value.codes == (code,)
    assert said in str(caught.value)
    (finding,) = caught.value.findings
    assert finding.file == "config.json"
    assert finding.fix


@pytest.mark.parametrize("opening", ["[", '{"a":', '[{"a":', '{"a":['])
@pytest.mark.parametrize("times", [101, 900, 100_000])
def test_deep_nesting_is_one_clear_error(opening: str, times: int) -> None:
    depth = times * (opening.count("[") + opening.count("{"))
    closing = opening.translate(str.maketrans("[{", "]}", '"a:'))[::-1]
    for content in (opening * times, '{"x":' + opening * times + "0" + closing * times + "}"):
        with pytest.raises(NpuQuantError) as caught:
            parse(content)
        assert caught.value.codes == ("unreadable-file",)
        if content.endswith("}") or depth > 10_000:
            assert "nested too deeply" in str(caught.value)
            assert "at most 100 levels" in str(caught.value)


def test_the_limit_of_depth_counts_objects_and_arrays() -> None:
    assert parse('{"a": [{"b": 1}]}', max_depth=3) == {"a": [{"b": 1}]}
    with pytest.raises(NpuQuantError, match="at most 2 levels"):
        parse('{"a": [{"b": 1}]}', max_depth=2)


def test_what_json_allows_comes_through() -> None:
    text = '{"a": [true, null, -1.5e3, {"b": []}], "\\ud83d\\ude00": "\\u00e4", "": -7, "c": {}}'
    assert parse(text) == json.loads(text)
    assert type(parse('{"a": -0}')["a"]) is float, "readers other than Python's take -0 for a float"


def test_limit_of_size(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"a": "' + "x" * 100 + '"}')
    assert read_json(file, max_bytes=file.stat().st_size)
    with pytest.raises(NpuQuantError, match=r"larger than the limit[^$]*at most 50 bytes"):
        read_json(file, max_bytes=50)
    with pytest.raises(NpuQuantError, match="larger than the limit"):
        parse(file.read_bytes(), max_bytes=50)
    with open(file, "wb") as stream:
        stream.truncate(2**40)  # a sparse file: reading it would fill the memory
    with pytest.raises(NpuQuantError, match="1,099,511,627,776 bytes"):
        read_json(file)


def test_limit_of_values() -> None:
    content = b'{"a":[' + b"[]," * (json_files.MAX_ITEMS // 2) + b"1]}"
    begin = time.process_time()
    with pytest.raises(NpuQuantError, match="more values than any checkpoint needs"):
        parse(content)
    assert time.process_time() - begin < 1


def test_long_numbers_where_python_has_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_files.sys, "get_int_max_str_digits", lambda: 0)
    assert parse('{"a": ' + "1" * 4300 + "}")
    begin = time.process_time()
    with pytest.raises(NpuQuantError, match="an integer of more than 4300 digits"):
        parse('{"a": ' + "1" * 10**7 + "}")
    assert time.process_time() - begin < 1


def test_the_garbage_collector_is_left_as_it_was() -> None:
    assert gc.isenabled()
    parse("{}")
    assert gc.isenabled()
    gc.disable()
    try:
        parse("{}")
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_long_keys_on_a_path_cost_nothing() -> None:
    content = '{"' + "k" * MEBIBYTE + '": [' + "[0]," * 200_000 + '{"a": 1, "a": 2}]}'
    begin = time.process_time()
    with pytest.raises(NpuQuantError) as caught:
        parse(content)
    assert time.process_time() - begin < 2
    assert caught.value.codes == ("bad-config",)
    assert len(str(caught.value)) < 1000


def test_missing_file_names_what_is_near(tmp_path: Path) -> None:
    (tmp_path / "quant_model_description.json").write_text("{}")
    with pytest.raises(NpuQuantError) as caught:
        read_json(tmp_path / "quant_model_descriptions.json")
    assert caught.value.findings[0].nearest == ("quant_model_description.json",)
    with pytest.raises(NpuQuantError, match="does not exist"):
        read_json(tmp_path / "no" / "such.json")


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(NpuQuantError, match="a folder"):
        read_json(tmp_path)
    (tmp_path / "broken.json").symlink_to("../../blobs/0123")
    with pytest.raises(NpuQuantError, match=r"a link to \.\./\.\./blobs/0123"):
        read_json(tmp_path / "broken.json")
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(NpuQuantError, match="a pipe or device"):  # and it does not wait for a writer
        read_json(tmp_path / "pipe.json")
    (tmp_path / "around.json").symlink_to("around.json")
    with pytest.raises(NpuQuantError, match="cannot be read"):
        read_json(tmp_path / "around.json")
    with pytest.raises(NpuQuantError, match="cannot be read"):
        read_json(tmp_path / "nul\0.json")


@pytest.mark.skipif(os.getuid() == 0, reason="root may read every file")
def test_forbidden_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "config.json").chmod(0)
    with pytest.raises(NpuQuantError, match="Permission denied"):
        read_json(tmp_path / "config.json")


def test_a_description_of_136000_tensors_is_fast(tmp_path: Path) -> None:
    names = [f"model.layers.{n // 2304}.mlp.experts.{n // 9 % 256}.down_proj.weight_scale.{n}" for n in range(136_000)]
    file = tmp_path / "quant_model_description.json"
    file.write_text(json.dumps(dict.fromkeys(names, "W8A8_DYNAMIC"), indent=2))
    times = []
    for _ in range(5):
        begin = time.process_time()
        description = read_json(file, max_bytes=json_files.DESCRIPTION_MAX_BYTES)
        times.append(time.process_time() - begin)
    assert list(description) == names
    # 0.1 s on an idle machine, half as much again as json.loads alone; the bound leaves room for a busy one.
    assert min(times) < 0.5


PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@PATIENT
@given(st.dictionaries(st.text(), JSON), st.booleans())
def test_round_trip(value: dict, ascii_only: bool) -> None:
    assert parse(json.dumps(value, ensure_ascii=ascii_only).encode("utf-8")) == value


@PATIENT
@given(st.binary() | st.text(alphabet='{}[]",:0123456789eE+-.\\u nultrefaINd \n').map(str.encode))
def test_arbitrary_bytes(content: bytes) -> None:
    try:
        result = parse(content)
    except NpuQuantError as error:
        codes, text = set(error.codes), str(error)
    else:
        codes, text = set(), ""
        assert result == json.loads(content.decode("utf-8"))
    assert codes <= {"unreadable-file", "bad-config"}
    text.encode("utf-8")


@pytest.mark.parametrize(
    "content", [b"[" * 10**5, b'{"a":' * 10**5, b'{"a": "[[[[", "b": ' + b"[" * 600 + b"]" * 600 + b"}"]
)
def test_files_too_deep_for_other_parsers(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(NpuQuantError, match="nested too deeply") as caught:
        check_depth(tmp_path / "config.json", file="config.json")
    assert caught.value.codes == ("unreadable-file",)


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[" * 500 + b"]" * 500, b"[]," * 10**5, b'{"a": "' + b"[" * 10**5 + b'"}', b'["\\"' + b",[]" * 10**4],
)
def test_files_that_others_may_read(content: bytes, tmp_path: Path) -> None:
    """Depth is all that is checked: other parsers allow more than this package's."""
    (tmp_path / "config.json").write_bytes(content)
    check_depth(tmp_path / "config.json", file="config.json")


def test_numbers_that_only_python_writes(tmp_path: Path) -> None:
    """transformers writes them into config.json: Mamba2's time_step_limit is [0.0, Infinity]."""
    file = tmp_path / "config.json"
    file.write_text('{"time_step_limit": [0.0, Infinity], "a": -Infinity, "b": NaN}')
    found = read_json(file)
    assert found["time_step_limit"] == [0.0, float("inf")]
    assert found["a"] == float("-inf")
    assert found["b"] != found["b"]
