"""Float grids: rounding to E4M3 and E2M1, block scales, MXFP4's and NVFP4's scales, and the memory form."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.tensor import E2M1, QuantizedTensor, dequantize
from qwen3_export.errors import RecipeError
from qwen3_export.model.activations import round_e4m3, rounder
from qwen3_export.model.workers import Workers
from qwen3_export.solve.method import LinearGroup
from qwen3_export.solve.methods.rtn import Options, solve
from qwen3_export.solve.rounding.grid import find_grid, round_to

FP8 = {"num_bits": 8, "type": "float"}
SCHEMES = {
    "channel": QuantScheme(**FP8, strategy="channel"),
    "tensor": QuantScheme(**FP8, strategy="tensor"),
    "blocks": QuantScheme(**FP8, strategy="block", block_shape=(16, 32)),
    "groups": QuantScheme(**FP8, strategy="group", group_size=32),
    "mxfp8": QuantScheme(**FP8, group_size=32, scale_dtype="e8m0"),
    "mxfp4": QuantScheme(num_bits=4, type="float", group_size=32, scale_dtype="e8m0"),
    "nvfp4": QuantScheme(num_bits=4, type="float", group_size=16, scale_dtype="e4m3"),
    "int8": QuantScheme(num_bits=8, strategy="channel"),
    "int4 signed": QuantScheme(num_bits=4, group_size=32, signed_scales=True),
}
NVFP4_INPUTS = QuantScheme(4, "float", group_size=16, scale_dtype="e4m3", activations="dynamic-group")


def numbers() -> torch.Tensor:
    """Every E4M3 number, what lies halfway between neighbours, and random ones of all sizes."""
    grid = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    halves = (grid[1:] + grid[:-1]) / 2
    random = np.random.default_rng(0).normal(size=20000) * np.exp(np.random.default_rng(1).uniform(-14, 7, 20000))
    all_of_them = np.concatenate([grid, halves, random.astype(np.float32), [500.0, 1e9]]).astype(np.float32)
    return torch.from_numpy(np.concatenate([all_of_them, -all_of_them]))


def test_e4m3_rounding_is_that_of_ml_dtypes() -> None:
    x = numbers()
    wanted = x.numpy().clip(-448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(round_e4m3(x).numpy(), wanted)


def test_e2m1_rounding_is_that_of_ml_dtypes() -> None:
    x = numbers() / 32
    found = round_to(x, torch.ones(()), torch.zeros(()), SCHEMES["mxfp4"]).numpy()
    np.testing.assert_array_equal(found, x.numpy().clip(-6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32))
    codes = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    np.testing.assert_array_equal(E2M1, codes)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("shape", [(48, 96), (33, 160)])
def test_what_is_stored_is_the_nearest_number_of_its_grid(
    pool: Workers, scheme: QuantScheme, shape: tuple[int, int]
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.05
    tensor = solve(LinearGroup({"w": weight}, {"w": scheme}), Options(), pool)["w"].tensor
    assert tensor.scales.shape == scheme.grid(shape)
    plain = transcribed(tensor)
    np.testing.assert_array_equal(dequantize(tensor), plain)
    others = np.arange(scheme.max_code + 1, dtype=np.uint8)
    if scheme == SCHEMES["channel"]:
        others = others[(others & 0x7F) != 0x7F]
    for o, i in np.random.default_rng(0).integers(0, shape, (60, 2)):
        values = [value(tensor, int(o), int(i), int(code)) for code in others]
        nearest = np.nanmin(np.abs(np.array(values) - float(weight[o, i])))
        assert abs(plain[o, i] - float(weight[o, i])) <= nearest * (1 + 1e-6) + 1e-12


def value(tensor: QuantizedTensor, o: int, i: int, code: int) -> float:
    scheme = tensor.scheme
    scale = np.float32(
        tensor.scales[o // scheme.rows_per_scale(tensor.shape[0]), i // scheme.group_length(tensor.shape[1])]
    )
    if tensor.global_scale is not None:
        scale = scale / np.float32(tensor.global_scale)
    if scheme.type == "int":
        return float((np.float32(code) - np.float32(scheme.midpoint)) * scale)
    kind = ml_dtypes.float8_e4m3fn if scheme.num_bits == 8 else ml_dtypes.float4_e2m1fn
    return float(np.array([code], np.uint8).view(kind).astype(np.float32)[0] * scale)


def transcribed(tensor: QuantizedTensor) -> np.ndarray:
    rows = [
        [value(tensor, o, i, int(tensor.codes[o, i])) for i in range(tensor.shape[1])] for o in range(tensor.shape[0])
    ]
    return np.array(rows, np.float32)


def test_a_block_scale_covers_its_block_alone() -> None:
    scheme = QuantScheme(**FP8, strategy="block", block_shape=(16, 32))
    weight = torch.randn(40, 80, generator=torch.Generator().manual_seed(1))
    grid = find_grid(weight, scheme, "absmax")
    for row in range(3):
        for column in range(3):
            block = weight[row * 16 : row * 16 + 16, column * 32 : column * 32 + 32]
            wanted = (block.abs().max() / 448).to(torch.bfloat16).float()
            assert grid.scales[row, column] == wanted


def test_nvfp4_linears_that_are_fused_share_their_global_scale(pool: Workers) -> None:
    scheme = SCHEMES["nvfp4"]
    weights = {"q": torch.randn(32, 64) * 0.1, "k": torch.randn(16, 64)}
    solved = solve(LinearGroup(weights, dict.fromkeys(weights, scheme)), Options(), pool)
    shared = {solved[name].tensor.global_scale for name in weights}
    assert len(shared) == 1
    largest = max(float(weight.abs().max()) for weight in weights.values())
    assert shared.pop() == pytest.approx(448 * 6 / largest, rel=1e-6)


def test_a_signed_scale_puts_the_largest_weight_on_the_lowest_code(pool: Workers) -> None:
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(2))
    scheme = SCHEMES["int4 signed"]
    tensor = solve(LinearGroup({"w": weight}, {"w": scheme}), Options(scale_search="absmax"), pool)["w"].tensor
    groups = weight.reshape(24, 2, 32)
    at = groups.abs().argmax(-1)
    assert (np.take_along_axis(tensor.codes.reshape(24, 2, 32), at[..., None].numpy(), -1) == 0).all()
    largest = np.take_along_axis(groups.numpy(), at[..., None].numpy(), -1)[..., 0]
    np.testing.assert_array_equal(np.sign(tensor.scales32), -np.sign(largest))


@pytest.mark.parametrize("kind", ["int", "float"])
@pytest.mark.parametrize("activations", ["dynamic-token", "dynamic-group", "static-tensor"])
def test_inputs_are_rounded_as_a_plain_loop_does_it(kind: str, activations: str) -> None:
    scheme = QuantScheme(num_bits=8, type=kind, strategy="channel", activations=activations)
    x = torch.randn(2, 3, 256, generator=torch.Generator().manual_seed(3)) * 4
    x[0, 0] = 0
    found = rounder(scheme, 0.03125)(x)
    length = {"dynamic-token": 256, "dynamic-group": 128, "static-tensor": 256}[activations]
    for part, rounded in zip(x.reshape(-1, length).numpy(), found.reshape(-1, length).numpy(), strict=True):
        unit = 127.5 if kind == "int" else 448
        scale = np.float32(0.03125 if activations == "static-tensor" else np.abs(part).max() / np.float32(unit))
        scale = scale if scale > 0 else np.finfo(np.float32).eps
        units = part / scale
        if kind == "int":
            wanted = np.clip(np.round(units), -128, 127)
        else:
            wanted = units.clip(-448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
        np.testing.assert_allclose(rounded, wanted * scale, rtol=1e-6)


def test_nvfp4_inputs_are_rounded_twice_as_a_plain_loop_does_it() -> None:
    """Groups of zeros, of numbers too small for a scale, ties, and a group beyond what the calibrated scale covers."""
    x = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(4)) * torch.logspace(-7, 5, 9)[:, None]
    x[0, 0], x[1, 0, :16] = 0, torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6]).repeat(2)
    x[1, 0, 1:8] *= -1
    above = 0.0625
    found = rounder(NVFP4_INPUTS, above)(x)
    for part, rounded in zip(x.reshape(-1, 16).numpy(), found.reshape(-1, 16).numpy(), strict=True):
        inner = np.float32(np.abs(part).max() / np.float32(6) / above).clip(max=448).astype(ml_dtypes.float8_e4m3fn)
        if inner == 0:
            assert (rounded == 0).all()
            continue
        scale = np.float32(inner) * np.float32(above)
        wanted = (part / scale).clip(-6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
        np.testing.assert_array_equal(rounded, wanted * scale)
    assert float(found.abs().max()) == 448 * above * 6
    np.testing.assert_array_equal(found[1, 0, :8], torch.tensor([0, -1, -1, -2, -2, -4, -4, -6]))


@pytest.mark.parametrize("peak", [3e-4, 1.0, 17.3, 2688.0, 2700.0, 61234.5])
def test_the_scale_above_nvfp4_inputs_covers_them_and_is_exact_in_16_bits(pool: Workers, peak: float) -> None:
    group = LinearGroup({"w": torch.randn(8, 32)}, {"w": NVFP4_INPUTS}, input_peak=peak)
    scale = solve(group, Options(), pool)["w"].tensor.input_scale
    assert scale is not None
    assert scale >= peak / (448 * 6)
    assert scale <= max(peak / (448 * 6) * 1.125, 2.0**-14)
    products = np.float32(scale) * np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    products = products[np.isfinite(products) & (np.abs(products) >= 2.0**-14)]
    for kind in (np.float16, ml_dtypes.bfloat16):
        np.testing.assert_array_equal(products.astype(kind).astype(np.float32), products)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"type": "float", "num_bits": 8, "symmetric": False}, "symmetric"),
        ({"type": "float", "num_bits": 8, "signed_scales": True}, "its own sign"),
        ({"type": "float", "num_bits": 4}, "4-bit float weights with bf16 scales"),
        ({"type": "float", "num_bits": 4, "scale_dtype": "e8m0", "group_size": 16}, "group_size is 32"),
        ({"num_bits": 4, "scale_dtype": "e4m3"}, "4-bit int weights with e4m3"),
        ({"num_bits": 4, "activations": "dynamic-token"}, "beside 4-bit weights"),
        ({"strategy": "block", "num_bits": 8, "symmetric": False}, "block"),
        ({"strategy": "block", "num_bits": 8, "block_shape": (128, 0)}, "block_shape"),
        ({"symmetric": False, "signed_scales": True}, "signed_scales"),
    ],
)
def test_impossible_schemes_are_refused(changes: dict[str, object], match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        QuantScheme(**changes)  # type: ignore[arg-type]
