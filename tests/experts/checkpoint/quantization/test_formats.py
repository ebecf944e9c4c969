"""Every stored format, read from a checkpoint: its float64 meaning, its bytes, and what is refused of it by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from experts.checkpoint import CheckpointError, ExpertCheckpoint
from experts.checkpoint.quantization.from_config import scheme_of
from experts.checkpoint.quantization.scheme import SUFFIXES, beside
from tests.support.quantized_checkpoint import LAYERS, D, E, I, quantized, stem
from tests.support.quantized_formats import FORMATS

UNREAD = ("weight_shape", "input_scale", "input_global_scale")
# Where it is missing, the format allows to do without.
OPTIONAL = {"g_idx"}
PIECES = [
    (name, piece)
    for name, form in FORMATS.items()
    for piece in form.make(32, 32, np.random.default_rng(0), None).tensors
    if piece not in UNREAD
]


@pytest.mark.parametrize("name", FORMATS)
def test_values_are_those_of_float64(tmp_path: Path, name: str) -> None:
    form, made = FORMATS[name], quantized(tmp_path, FORMATS[name])
    checkpoint = ExpertCheckpoint.open(made.folder)
    checkpoint.check()
    assert checkpoint.spec.quantization == form.name
    for layer in range(LAYERS):
        for expert in range(E):
            gate, up, down = (made.values[stem(layer, expert) + n] for n in ("gate_proj", "up_proj", "down_proj"))
            whole = checkpoint.read_expert(layer, expert, torch.float32)
            for found, expected in ((whole.w13_2ID, np.concatenate([gate, up])), (whole.w2_DI, down)):
                assert found.is_contiguous()
                # NVFP4 in ModelOpt's form and FP8 round the product of two scales, or of a value and a scale, once.
                np.testing.assert_allclose(found.double().numpy(), expected, rtol=2**-23, atol=0)
            low = checkpoint.read_expert(layer, expert, torch.bfloat16)
            assert torch.equal(low.w13_2ID, whole.w13_2ID.bfloat16())
            assert torch.equal(low.w2_DI, whole.w2_DI.bfloat16())


@pytest.mark.parametrize("name", FORMATS)
def test_all_tensors_are_the_experts_and_bytes_are_counted(tmp_path: Path, name: str) -> None:
    made = quantized(tmp_path, FORMATS[name])
    checkpoint = ExpertCheckpoint.open(made.folder)
    assert all(checkpoint.owns(tensor) for tensor in made.tensors)
    assert not checkpoint.owns("model.layers.0.mlp.gate.weight")
    assert not checkpoint.owns("model.layers.0.self_attn.q_proj.qweight")
    of_first = {n: t for n, t in made.tensors.items() if n.startswith(stem(0, 0))}
    read = sum(t.nbytes for n, t in of_first.items() if n.rpartition(".")[2] not in UNREAD)
    assert checkpoint.expert_bytes == read
    scheme = checkpoint.scheme
    assert scheme is not None
    told = 2 * scheme.matrix_bytes(I, D, 2) + scheme.matrix_bytes(D, I, 2)
    # Of the shape, ours counts two int32, and what may be missing not at all; a static scale is not counted.
    slack = sum(t.nbytes for n, t in of_first.items() if n.rpartition(".")[2] in (*UNREAD, "g_idx"))
    assert read - slack <= told <= read + slack


@pytest.mark.parametrize("name", FORMATS)
def test_kernels_are_given_what_they_keep(tmp_path: Path, name: str) -> None:
    form, made = FORMATS[name], quantized(tmp_path, FORMATS[name])
    checkpoint = ExpertCheckpoint.open(made.folder)
    if form.kept is None:
        assert checkpoint.weight_format is None
        with pytest.raises(CheckpointError, match="are not all stored quantized as kernels keep them"):
            checkpoint.read_quantized(0, 0)
        return
    assert checkpoint.weight_format is not None
    assert checkpoint.weight_format.name == form.kept
    for expert in range(E):
        kept, plain = checkpoint.read_quantized(1, expert), checkpoint.read_expert(1, expert, torch.float32)
        same = kept.dequantize(torch.float32)
        assert torch.equal(same.w13_2ID, plain.w13_2ID)
        assert torch.equal(same.w2_DI, plain.w2_DI)
        assert kept.w13_2IB.dtype == kept.w2_DB.dtype == torch.uint8
        assert kept.w13_2IB.shape == (2 * I, kept.format.row_bytes(D))
        assert kept.w2_scale.shape == kept.format.scale_shape(D, I)


@pytest.mark.parametrize(("name", "piece"), PIECES)
def test_what_is_missing_or_has_another_shape_or_dtype_is_named(tmp_path: Path, name: str, piece: str) -> None:
    made = quantized(tmp_path, FORMATS[name])
    tensor = stem(1, 2) + "up_proj." + piece
    intact = made.tensors.pop(tensor)
    made.write()
    if piece in OPTIONAL and name != "gptq_desc_act":
        ExpertCheckpoint.open(made.folder).check()
    else:
        with pytest.raises(CheckpointError, match=f"tensor {tensor} is missing"):
            ExpertCheckpoint.open(made.folder).check()
    made.tensors[tensor] = torch.cat([intact.reshape(-1), intact.reshape(-1)])
    made.write()
    with pytest.raises(CheckpointError, match=rf"{tensor} has shape \[.*\], expected \["):
        ExpertCheckpoint.open(made.folder).check()
    made.tensors[tensor] = intact.float().to(torch.int16)
    made.write()
    with pytest.raises(CheckpointError, match=rf"{tensor} is I16, expected .*quantization in config\.json: "):
        ExpertCheckpoint.open(made.folder).check()


@pytest.mark.parametrize("name", FORMATS)
def test_an_expert_that_was_left_out_is_read_as_it_is(tmp_path: Path, name: str) -> None:
    made = quantized(tmp_path, FORMATS[name])
    module = stem(1, 1) + "down_proj"
    for tensor in [n for n in made.tensors if n.startswith(module + ".")]:
        del made.tensors[tensor]
    made.tensors[module + ".weight"] = torch.randn(D, I).bfloat16()
    made.write()
    checkpoint = ExpertCheckpoint.open(made.folder)
    checkpoint.check()
    assert checkpoint.weight_format is None
    assert torch.equal(checkpoint.read_expert(1, 1, torch.bfloat16).w2_DI, made.tensors[module + ".weight"])
    np.testing.assert_allclose(
        checkpoint.read_expert(1, 0, torch.float32).w2_DI.double().numpy(),
        made.values[stem(1, 0) + "down_proj"],
        rtol=2**-23,
    )


@pytest.mark.parametrize(
    ("name", "rows", "columns", "message"),
    [
        ("awq", 64, 144, "144 columns are not a multiple of the 32 that share a scale in awq"),
        ("awq", 84, 128, "84 rows are not a multiple of the 8 that share an int32 in awq"),
        ("gptq", 64, 80, "80 columns are not a multiple of the 32 that share a scale in gptq"),
        ("gptq", 84, 128, "84 rows are not a multiple of the 8 that share an int32 in gptq"),
        ("gptq_8_bits", 82, 128, "82 rows are not a multiple of the 4 that share an int32 in gptq"),
        ("int4_zeros", 64, 112, "112 columns are not a multiple of the 32 that share a scale in int4"),
        ("int4_zeros", 84, 128, "84 rows are not a multiple of the 8 that share an int32 in int4"),
        ("w8a16", 64, 98, "98 columns are not a multiple of the 4 that share an int32 in int8"),
        ("int4_channel", 64, 132, "132 columns are not a multiple of the 8 that share an int32 in int4"),
        ("nvfp4", 64, 136, "136 columns are not a multiple of the 16 that share a scale in nvfp4"),
        ("mxfp4", 64, 144, "144 columns are not a multiple of the 32 that share a scale in mxfp4"),
    ],
)
def test_sizes_that_do_not_fill_groups_or_words_are_refused(
    tmp_path: Path, name: str, rows: int, columns: int, message: str
) -> None:
    scheme = scheme_of(FORMATS[name].config, tmp_path)
    assert scheme.misfit(rows, columns) == message
    assert scheme.misfit(64, 128) is None
    made = quantized(tmp_path, FORMATS[name])
    made.config |= {"hidden_size": columns, "moe_intermediate_size": rows}
    with pytest.raises(CheckpointError, match=rf"experts\.0\.gate_proj\.\w+: {message}"):
        ExpertCheckpoint.open(made.write()).check()


def test_tensors_of_all_experts_are_refused(tmp_path: Path) -> None:
    """Names that transformers writes, with a format that has tensors for each expert."""
    made = quantized(tmp_path, FORMATS["fp8_channel"])
    layer = "model.layers.0.mlp.experts."
    made.tensors = {
        layer + "gate_up_proj": torch.zeros(E, 2 * I, D).to(torch.float8_e4m3fn),
        layer + "gate_up_proj_scale": torch.ones(E, 2 * I, 1),
        layer + "down_proj": torch.zeros(E, D, I).to(torch.float8_e4m3fn),
    }
    made.write()
    with pytest.raises(
        CheckpointError, match="gate_up_proj: FP8 with a scale a row is not supported in a tensor of all"
    ):
        ExpertCheckpoint.open(made.folder).check()


@pytest.mark.parametrize(
    ("name", "piece", "value", "message"),
    [
        (
            "gptq",
            "qzeros",
            0x77777778,
            "qzeros has 8, expected 7 everywhere: sym is true, and the format's version is 1",
        ),
        ("gptq_v2", "qzeros", 0x77777777, "qzeros has 7, expected 8 everywhere: .* version is 2"),
        ("gptq", "g_idx", 1, "g_idx has columns out of order, expected runs of a group: desc_act is false"),
        ("gptq_desc_act", "g_idx", 4, r"columns are in groups 0\.\.4, expected 0\.\.3"),
        ("gptq_desc_act", "g_idx", -1, r"columns are in groups -1\.\.3, expected 0\.\.3"),
        ("int4_actorder", "weight_g_idx", 9, r"columns are in groups 0\.\.9, expected 0\.\.3"),
        ("nvfp4", "weight_global_scale", 0.0, r"the scale of the whole matrix is 0\.0, expected a positive number"),
        ("nvfp4_modelopt", "weight_scale_2", float("nan"), "the scale of the whole matrix is nan"),
    ],
)
def test_values_that_contradict_the_settings_are_refused_with_the_matrix(
    tmp_path: Path, name: str, piece: str, value: float, message: str
) -> None:
    made = quantized(tmp_path, FORMATS[name])
    module = stem(0, 1) + "gate_proj"
    made.tensors[f"{module}.{piece}"].view(-1)[0] = value
    checkpoint = ExpertCheckpoint.open(made.write())
    checkpoint.check()  # which reads headers only
    with pytest.raises(CheckpointError, match=rf"model.safetensors: {module}\.weight: .*{message}"):
        checkpoint.read_expert(0, 1, torch.float32)
    if FORMATS[name].kept is not None:
        with pytest.raises(CheckpointError, match=message):
            checkpoint.read_quantized(0, 1)


def test_no_suffix_makes_another_modules_name() -> None:
    name = "model.layers.0.mlp.experts.0.up_proj.weight"
    assert len({beside(name, suffix) for suffix in SUFFIXES}) == len(SUFFIXES)
    assert all(beside(name, suffix).startswith("model.layers.0.mlp.experts.0.up_proj.") for suffix in SUFFIXES)
