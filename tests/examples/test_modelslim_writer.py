# SPDX-License-Identifier: Apache-2.0
"""The writer against a checkpoint that msModelSlim 26.1.0 wrote from the same float model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import modelslim_writer  # noqa: E402
from modelslim_writer import write_modelslim  # noqa: E402
from quantize import quantize_per_channel  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
SOURCE = FIXTURES / "source-tiny-qwen3"
PRODUCER = {"W8A8_DYNAMIC": FIXTURES / "msmodelslim-qwen3-w8a8-dynamic", "W8A16": FIXTURES / "msmodelslim-qwen3-w8a16"}
WEIGHTS = "quant_model_weights-00001-of-00001.safetensors"
INDEX = "quant_model_weights.safetensors.index.json"
DESCRIPTION = "quant_model_description.json"


def header(file: Path) -> bytes:
    content = file.read_bytes()
    return content[: 8 + int.from_bytes(content[:8], "little")]


def copy_of_source(folder: Path, *, config: dict[str, object] | None = None, drop: str = "") -> Path:
    """A source model that a test may change: ``config`` is merged into config.json, the tensor ``drop`` is left out."""
    shutil.copytree(SOURCE, folder)
    if config:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    if drop:
        file = folder / "model.safetensors"
        save_file({name: tensor for name, tensor in load_file(file).items() if name != drop}, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize("scheme", PRODUCER)
def test_every_byte_is_the_producers_when_rounding_as_it_does(scheme: str, tmp_path: Path) -> None:
    written = write_modelslim(SOURCE, tmp_path / "out", scheme, like_producer=True)
    for name in (WEIGHTS, INDEX, DESCRIPTION, "config.json"):
        assert (written / name).read_bytes() == (PRODUCER[scheme] / name).read_bytes(), name


@pytest.mark.parametrize("scheme", PRODUCER)
def test_by_default_only_the_rounding_differs_from_the_producer(scheme: str, tmp_path: Path) -> None:
    written = write_modelslim(SOURCE, tmp_path / "out", scheme)
    for name in (INDEX, DESCRIPTION):
        assert (written / name).read_bytes() == (PRODUCER[scheme] / name).read_bytes(), name
    assert header(written / WEIGHTS) == header(PRODUCER[scheme] / WEIGHTS)
    ours, theirs = load_file(written / WEIGHTS), load_file(PRODUCER[scheme] / WEIGHTS)
    for name, tensor in ours.items():
        if tensor.dtype == torch.int8:
            assert (tensor.int() - theirs[name].int()).abs().max() <= 1, name
        elif name.endswith("_scale"):
            torch.testing.assert_close(tensor, theirs[name], rtol=2**-8, atol=0)
        else:
            assert torch.equal(tensor, theirs[name]), name


def test_weights_come_back_within_half_a_scale(tmp_path: Path) -> None:
    written = load_file(write_modelslim(SOURCE, tmp_path / "out") / WEIGHTS)
    source = load_file(SOURCE / "model.safetensors")
    quantized = [name for name, tensor in written.items() if tensor.dtype == torch.int8]
    assert len(quantized) == 2 * 7
    for name in quantized:
        scale = written[f"{name}_scale"]
        assert written[name].abs().max() <= 127
        assert not written[f"{name}_offset"].any()
        error = (source[name].double() - written[name].double() * scale.double()).abs()
        assert (error <= scale.double() / 2 * (1 + 1e-5)).all(), name


def test_the_folder_is_a_whole_model(tmp_path: Path) -> None:
    written = write_modelslim(SOURCE, tmp_path / "out")
    assert {path.name for path in written.iterdir()} == {
        *(path.name for path in SOURCE.iterdir() if path.suffix != ".safetensors"),
        *(WEIGHTS, INDEX, DESCRIPTION),
    }
    assert "quantization_config" not in json.loads((written / "config.json").read_text())


def test_a_tied_head_is_written_as_well(tmp_path: Path) -> None:
    source = copy_of_source(tmp_path / "tied", config={"tie_word_embeddings": True}, drop="lm_head.weight")
    written = write_modelslim(source, tmp_path / "out")
    tensors = load_file(written / WEIGHTS)
    assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    description = json.loads((written / DESCRIPTION).read_text())
    assert description["lm_head.weight"] == "FLOAT"
    assert json.loads((written / "config.json").read_text())["tie_word_embeddings"] is True
    index = json.loads((written / INDEX).read_text())
    assert index["weight_map"]["lm_head.weight"] == WEIGHTS
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())


def test_modules_that_are_asked_for_stay_float(tmp_path: Path) -> None:
    keep = (*modelslim_writer.KEEP_FLOAT, "*.layers.0.*", "*down_proj")
    written = write_modelslim(SOURCE, tmp_path / "out", keep_float=keep)
    tensors, source = load_file(written / WEIGHTS), load_file(SOURCE / "model.safetensors")
    description = json.loads((written / DESCRIPTION).read_text())
    for name, weight in source.items():
        quantized = ".layers.1." in name and name.endswith("_proj.weight") and "down_proj" not in name
        assert description[name] == ("W8A8_DYNAMIC" if quantized else "FLOAT"), name
        assert (f"{name}_scale" in tensors) == quantized
        assert quantized or torch.equal(tensors[name], weight)


def test_many_small_parts_hold_the_same_tensors(tmp_path: Path) -> None:
    whole = write_modelslim(SOURCE, tmp_path / "whole")
    parts = write_modelslim(SOURCE, tmp_path / "parts", part_bytes=300_000)
    files = sorted(path.name for path in parts.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"quant_model_weights-00001-of-{len(files):05d}.safetensors"
    index = json.loads((parts / INDEX).read_text())
    together = {}
    for file in files:
        tensors = load_file(parts / file)
        assert set(tensors) == {name for name, where in index["weight_map"].items() if where == file}
        together.update(tensors)
    expected = load_file(whole / WEIGHTS)
    assert set(together) == set(expected)
    assert all(torch.equal(together[name], tensor) for name, tensor in expected.items())
    assert index["metadata"] == json.loads((whole / INDEX).read_text())["metadata"]


def test_a_source_in_several_files_gives_the_same_checkpoint(tmp_path: Path) -> None:
    source = tmp_path / "sharded"
    shutil.copytree(SOURCE, source)
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, source / file)
    weight_map = {name: file for file, part in halves.items() for name in part}
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    written = write_modelslim(source, tmp_path / "out")
    expected = write_modelslim(SOURCE, tmp_path / "expected")
    assert {path.name for path in written.iterdir()} == {path.name for path in expected.iterdir()}
    assert (written / WEIGHTS).read_bytes() == (expected / WEIGHTS).read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_hard_rows(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).tiny
    rows = {
        "zeros": [0.0, 0.0, 0.0, -0.0],
        "one value": [0.0, -3.0, 0.0, 0.0],
        "smallest": [tiny, -tiny, 0.0, tiny / 2],
        "largest": [torch.finfo(dtype).max, -torch.finfo(dtype).max, 1.0, 0.0],
        "halves": [127.0, 0.5, -1.5, 2.5],
    }
    weight = torch.tensor(list(rows.values()), dtype=torch.float64).to(dtype)
    values, scale = quantize_per_channel(weight)
    assert values.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert scale.shape == (len(rows), 1)
    assert (scale > 0).all()
    assert torch.isfinite(scale).all()
    assert values.abs().max() <= 127
    assert not values[0].any()
    assert values[1].tolist() == [0, -127, 0, 0]
    assert values[3].tolist() == [127, -127, 0, 0]
    assert values[4].tolist() == [127, 0, -2, 2]
    error = (weight.double() - values.double() * scale.double()).abs()
    assert (error <= scale.double() / 2 * (1 + 1e-5)).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name(bad: float, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(SOURCE, source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = bad
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: .*not finite"):
        write_modelslim(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_quantized_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="scheme 'W4A8' is not one of"):
        write_modelslim(SOURCE, tmp_path / "out", "W4A8")
    quantized = copy_of_source(tmp_path / "quantized", config={"quantization_config": {"quant_method": "awq"}})
    with pytest.raises(ValueError, match="quantized already"):
        write_modelslim(quantized, tmp_path / "out")
    shutil.copytree(PRODUCER["W8A16"], tmp_path / "int8")
    (tmp_path / "int8" / WEIGHTS).rename(tmp_path / "int8" / "model.safetensors")
    with pytest.raises(ValueError, match="is I8; the writer needs the float model"):
        write_modelslim(tmp_path / "int8", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out"
    assert modelslim_writer.main([str(SOURCE), str(target), "--scheme", "W8A16"]) == 0
    assert json.loads((target / DESCRIPTION).read_text())["model_quant_type"] == "W8A16"
    assert capsys.readouterr().out.strip() == str(target)
    with pytest.raises(SystemExit):
        modelslim_writer.main([str(SOURCE), str(target)])
    assert modelslim_writer.main([str(tmp_path / "nowhere"), str(tmp_path / "other")]) == 1
    assert "error:" in capsys.readouterr().err
