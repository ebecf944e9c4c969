"""Sizes, shapes and dtypes of every weight format and every part of a layout, against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from experts.checkpoint.dequantize import dequantize_fp8_block, dequantize_int4, dequantize_mxfp4
from experts.checkpoint.layout import Layout, Part
from experts.checkpoint.weight_format import QuantizedExpert, WeightFormat

FP8, MXFP4, INT4 = WeightFormat("fp8_block", 128), WeightFormat("mxfp4", 32), WeightFormat("int4", 64)


@pytest.mark.parametrize(("name", "groups"), [("fp8_block", {128}), ("mxfp4", {32}), ("int4", {16, 32, 64, 128})])
def test_groups_that_share_a_scale(name: str, groups: set[int]) -> None:
    for group in (0, 8, 15, 16, 31, 32, 33, 64, 127, 128, 129, 256):
        if group in groups:
            assert WeightFormat(name, group).group == group  # type: ignore[arg-type]
        else:
            expected = ", ".join(str(one) for one in sorted(groups))
            with pytest.raises(ValueError, match=f"{name} with groups of {group}, expected one of {expected}$"):
                WeightFormat(name, group)  # type: ignore[arg-type]


def test_rows_that_do_not_fill_their_groups_fit_blocks_alone() -> None:
    assert [FP8.misfit(columns) for columns in (1, 127, 200)] == [None] * 3
    assert (MXFP4.misfit(64), INT4.misfit(128)) == (None, None)
    assert MXFP4.misfit(48) == "48 columns are not a multiple of the 32 that share a scale in mxfp4"
    assert INT4.misfit(96) == "96 columns are not a multiple of the 64 that share a scale in int4"


def test_sizes_of_a_matrix() -> None:
    assert [form.row_bytes(192) for form in (FP8, MXFP4, INT4)] == [192, 96, 96]
    assert [FP8.scale_shape(*shape) for shape in ((128, 128), (129, 300), (1, 1))] == [(1, 1), (2, 3), (1, 1)]
    assert MXFP4.scale_shape(5, 96) == (5, 3)
    assert INT4.scale_shape(5, 128) == (5, 2)
    assert [form.scale_dtype(torch.bfloat16) for form in (FP8, MXFP4, INT4)] == [
        torch.float32,
        torch.uint8,
        torch.bfloat16,
    ]


def test_bytes_of_an_expert() -> None:
    D, I = 192, 320
    # gate and up 2 * 3 x 2 scales, down 2 x 3
    assert FP8.expert_bytes(D, I, torch.bfloat16) == 3 * D * I + 4 * (2 * 3 * 2 + 2 * 3)
    assert MXFP4.expert_bytes(D, I, torch.bfloat16) == 3 * D * I // 2 + 2 * I * 6 + D * 10
    assert INT4.expert_bytes(D, I, torch.bfloat16) == 3 * D * I // 2 + 2 * (2 * I * 3 + D * 5)
    assert INT4.expert_bytes(D, I, torch.float32) == 3 * D * I // 2 + 4 * (2 * I * 3 + D * 5)


def fp8_expert(with_bias: bool) -> QuantizedExpert:
    """D 3, I 2: values 1 everywhere, each matrix with a scale of its own."""
    one = torch.tensor([1.0]).to(torch.float8_e4m3fn).view(torch.uint8)
    return QuantizedExpert(
        FP8,
        w13_2IB=one.expand(4, 3).contiguous(),
        w13_scale=torch.tensor([[2.0], [3.0]]),
        w2_DB=one.expand(3, 2).contiguous(),
        w2_scale=torch.tensor([[5.0]]),
        b13_2I=torch.arange(4.0) if with_bias else None,
        b2_D=torch.arange(3.0) + 0.25 if with_bias else None,
    )


def test_an_expert_that_is_kept_quantized() -> None:
    plain, biased = fp8_expert(with_bias=False), fp8_expert(with_bias=True)
    assert plain.nbytes == 12 + 8 + 6 + 4
    assert biased.nbytes == plain.nbytes + 4 * (4 + 3)
    got = biased.dequantize(torch.bfloat16)
    assert got.w13_2ID.tolist() == [[2.0] * 3, [2.0] * 3, [3.0] * 3, [3.0] * 3], "gate and up have scales of their own"
    assert got.w2_DI.tolist() == [[5.0] * 2] * 3
    assert got.b13_2I is not None
    assert got.b2_D is not None
    assert (got.b13_2I.tolist(), got.b2_D.tolist()) == ([0, 1, 2, 3], [0.25, 1.25, 2.25])
    assert {got.w13_2ID.dtype, got.w2_DI.dtype, got.b13_2I.dtype, got.b2_D.dtype} == {torch.bfloat16}
    assert (plain.dequantize(torch.float32).b13_2I, plain.dequantize(torch.float32).b2_D) == (None, None)


def test_int4_has_the_low_bits_first_and_a_scale_a_group() -> None:
    packed = torch.tensor([[0x80, 0x9F, 0x17, 0x62], [0x00, 0xFF, 0x88, 0x01]], dtype=torch.uint8)
    scale = torch.tensor([[1.0, 0.5], [3.0, -2.0]], dtype=torch.bfloat16)
    expected = [[-8, 0, 7, 1, -0.5, -3.5, -3, -1], [-24, -24, 21, 21, 0, 0, 14, 16]]
    for dtype in (torch.float32, torch.bfloat16):
        got = dequantize_int4(packed, scale, dtype)
        assert (got.dtype, got.tolist()) == (dtype, expected)


def test_mxfp4_has_the_low_bits_first_and_powers_of_two() -> None:
    blocks = torch.zeros(1, 2, 16, dtype=torch.uint8)
    blocks[0, 0, :3] = torch.tensor([0x21, 0xF7, 0x9A])
    blocks[0, 1, 15] = 0x4C
    got = dequantize_mxfp4(blocks, torch.tensor([[127, 129]], dtype=torch.uint8))
    assert (got.dtype, got.shape) == (torch.bfloat16, (1, 64))
    assert got[0, :6].tolist() == [0.5, 1.0, 6.0, -6.0, -1.0, -0.5]
    assert got[0, -2:].tolist() == [-8.0, 8.0]
    assert got[0, 6:62].count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fp8_is_multiplied_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    weight = torch.tensor([[1.125, 1.875]]).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1 / 3]], dtype=torch.float32)
    expected = (weight.float() * scale).to(dtype)
    assert torch.equal(dequantize_fp8_block(weight, scale, 128, dtype), expected)
    assert torch.equal(dequantize_fp8_block(weight.view(torch.uint8), scale, 128, dtype), expected)


@pytest.mark.parametrize(
    ("role", "shape"),
    [
        ("gate", (5, 7)),
        ("up", (5, 7)),
        ("gate_up", (10, 7)),
        ("down", (7, 5)),
        ("gate_up_bias", (10,)),
        ("down_bias", (7,)),
    ],
)
def test_the_shape_of_each_part(role: str, shape: tuple[int, ...]) -> None:
    assert Part(role, "x").shape(7, 5) == shape  # type: ignore[arg-type]


def test_what_parts_and_layouts_are_if_nothing_is_said() -> None:
    part = Part("gate", "x")
    assert (part.stack, part.transposed, part.interleaved) == ("none", False, False)
    assert Layout((part,)).prefixes == ("model.", "model.language_model.", "language_model.model.", "")
    assert not Layout((part, Part("down", "y"))).has_bias
    for role in ("gate_up_bias", "down_bias"):
        assert Layout((part, Part(role, "y"))).has_bias  # type: ignore[arg-type]
