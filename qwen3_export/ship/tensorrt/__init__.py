"""TensorRT folders: a standard Q/DQ ONNX, and the plan built from it.

    model.onnx + model.onnx.data   ai.onnx operators only, also runs in ONNX Runtime
    model.plan                     runs on the compute capabilities named in engine.json, and no others
    engine.json                    engine, version, capabilities, shape profile, hash of the source; the plan's size and
                                   hash, or where none was built `trtexec`, the command that builds it in the folder

TensorRT-RTX builds the plan without a GPU: it specialises its kernels when the plan is loaded on the device.
"""

from __future__ import annotations

import importlib.util
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from qwen3_export.core.checkpoint import Checkpoint
from qwen3_export.core.manifest import file_list, to_json, write_manifest
from qwen3_export.core.outputs import staged_folder
from qwen3_export.core.plan_folder import CAPABILITIES, ENGINE, PLAN
from qwen3_export.core.progress import Progress
from qwen3_export.core.qwen3 import block_name
from qwen3_export.core.scheme import QuantScheme
from qwen3_export.core.tensor import QuantizedTensor
from qwen3_export.core.text_files import warn_of_text_files
from qwen3_export.errors import InputError, MissingRuntimeError, UnsupportedError
from qwen3_export.ship.exactness import cast_errors
from qwen3_export.ship.onnx import TYPES, qdq, write_graph
from qwen3_export.ship.onnx import size as onnx_size
from qwen3_export.ship.onnx.dense_experts import MOST_EXPERTS
from qwen3_export.ship.onnx.target import MODEL, Files, choose
from qwen3_export.ship.result import check_schemes, exactness, export_result, onnx_linear_bytes, provenance
from qwen3_export.ship.tensorrt.capabilities import DEFAULT, fitting, supports, too_old
from qwen3_export.ship.tensorrt.cost import BuildCost, build_cost, check_memory
from qwen3_export.ship.tensorrt.parser import check_graph
from qwen3_export.ship.tensorrt.plan_file import MODULES, build_plan
from qwen3_export.ship.tensorrt.profiles import (
    Profile,
    Shapes,
    check_positions,
    decode_shapes,
    default_profile,
    prefill_shapes,
    trtexec_line,
)

INSTALL = {"rtx": "pip install 'qwen3-export[tensorrt]'", "trt": "pip install tensorrt (on a machine with its GPU)"}
# Bytes of a plan beside its weights, in all and per block. Measured with 1.7; more capabilities add nothing.
_ENGINE_BYTES, _BLOCK_BYTES, _QUANTIZED_BLOCK_BYTES = 1_120_000, 753_000, 1_020_000
# A second profile's kernels, per block.
_SECOND_PROFILE_BYTES = 800_000


def export_tensorrt(
    checkpoint: Checkpoint,
    output: Path,
    engine: str = "rtx",
    capabilities: Sequence[str] | None = None,
    precision: str = "fp16",
    profile: Profile | None = None,
    force: bool = False,
    progress: Progress | None = None,
    onnx_only: bool = False,
) -> dict[str, Any]:
    """Write the ONNX, build the plan and check it.

    Returns the result that `--json` prints. With `onnx_only` no plan is built: the result's `trtexec` is the command
    that builds it on the device.

    Raises MissingRuntimeError without the engine's library, UnsupportedError when TensorRT or the capabilities cannot
    hold the codes, ResourceError when memory is too small or the builder is killed for lack of it.
    """
    started, progress = time.monotonic(), progress or Progress()
    profile = profile or default_profile(checkpoint.config)
    capabilities = check_request(checkpoint, engine, capabilities, precision, profile, onnx_only)
    warn_of_text_files(checkpoint.folder, checkpoint.name, progress)
    profiles = profiles_of(checkpoint, profile)
    inexact = cast_errors(checkpoint, precision) + scale_errors(checkpoint, precision)
    with staged_folder(output, force, inputs=[checkpoint.folder]) as folder:
        target = replace(choose("standard", precision=precision), flavor="tensorrt")
        write_graph(checkpoint, folder, target, Files(), progress)
        check_graph(folder)
        built = None if onnx_only else build_plan(folder, engine, capabilities, profiles, progress)
        origin, line = provenance(checkpoint), trtexec_line(Path(MODEL), Path(PLAN), profiles, engine, capabilities)
        described = {
            "engine": engine,
            "version": built["version"] if built else None,
            "compute_capabilities": _named(engine, capabilities, built),
            "precision": precision,
            "profile": asdict(profile),
            "profiles": built["profiles"] if built else len(profiles),
            "source_sha256": origin["source"]["sha256"],
            **(built["file"] if built else {"trtexec": line}),
        }
        (folder / ENGINE).write_text(to_json(described), encoding="utf-8")
        for path in checkpoint.sidecars():
            shutil.copyfile(path, folder / path.name)
        write_manifest(folder, "tensorrt", {**origin, **described, **exactness(inexact)})
        files = file_list(folder, {PLAN: described["plan_sha256"]} if built else None)
    result = export_result(output, files, checkpoint, inexact, started, onnx_linear_bytes(output))
    if built is None:
        return {**result, "trtexec": trtexec_line(output / MODEL, output / PLAN, profiles, engine, capabilities)}
    plan_bytes = next(item["bytes"] for item in files if item["path"] == PLAN)
    result["bits_per_weight"] = 8 * plan_bytes / checkpoint.config.num_parameters
    result["peak_rss_bytes"] = max(result["peak_rss_bytes"], built["peak_rss_bytes"])
    predicted = asdict(planned_cost(checkpoint, precision))
    result["build"] = {
        **{key: built[key] for key in ("seconds", "cpu_seconds", "peak_rss_bytes", "profiles")},
        "predicted": predicted,
    }
    return result


def profiles_of(checkpoint: Checkpoint, profile: Profile) -> list[Shapes]:
    """The optimization profiles of a model's plan; see `ship.tensorrt.profiles`.

    A second profile, for decoding, is made only where every linear holds integers: weights of other types would be
    stored twice (measured with 1.7).
    """
    shapes = [prefill_shapes(checkpoint.config, profile)]
    linears = [checkpoint.schemes.get(name) for name in checkpoint.config.all_linears()]
    if all(scheme is not None and scheme.type == "int" for scheme in linears):
        shapes.append(decode_shapes(checkpoint.config, profile))
    return shapes


def planned_cost(checkpoint: Checkpoint, precision: str = "fp16") -> BuildCost:
    """Memory and time that building the plan will take, from shapes alone."""
    quantized = onnx_size.quantized_bytes(checkpoint, precision)
    plain = onnx_size.weight_bytes(checkpoint, precision) - quantized
    outer = sum(
        2 * math.prod(shape)
        for name, shape in checkpoint.config.outer_matrices().items()
        if name not in checkpoint.schemes
    )
    profiles = profiles_of(checkpoint, default_profile(checkpoint.config))
    return build_cost(outer, max(plain - outer, 0), quantized, len(profiles), checkpoint.config.num_layers)


def _named(engine: str, capabilities: Sequence[str], built: dict[str, Any] | None) -> list[str]:
    """The compute capabilities of a plan: those asked for, or the building GPU's."""
    if engine == "rtx":
        return list(capabilities)
    return [str(built["capability"])] if built and built.get("capability") else []


def scale_errors(checkpoint: Checkpoint, precision: str) -> list[dict[str, Any]]:
    """Tensors with 8-bit scales that the plan changes, and their largest relative errors.

    TensorRT multiplies NVFP4's two scales in 16 bits, those of rounded inputs too. The range of 16 bits may not hold
    the powers of two of MXFP scales.
    """
    names = [name for name, scheme in checkpoint.schemes.items() if scheme.scale_dtype in ("e4m3", "e8m0")]
    found = []
    for name in names:
        weight = checkpoint.linear(name)
        assert isinstance(weight, QuantizedTensor)
        above = _errors_above(weight, precision)
        if error := max(*above, qdq.inexact_scales(weight, TYPES[precision])):
            found.append({"name": name, "max_rel_error": error})
    return found


def _errors_above(weight: QuantizedTensor, precision: str) -> tuple[float, float]:
    """Relative errors of the numbers above NVFP4's scales, of weights and of inputs.

    Raises UnsupportedError when one of them is 0 or infinite in 16 bits.
    """
    numbers = 1 / weight.global_scale if weight.global_scale else 1.0, weight.input_scale or 1.0
    errors = [qdq.inexact_number(number, TYPES[precision]) for number in numbers]
    if not all(map(math.isfinite, errors)):
        raise UnsupportedError(
            f"{weight.name}: {numbers[0]:.2g} and {numbers[1]:.2g}, which multiply the scales of weights and inputs, "
            f"do not fit into {precision}",
            "bf16 has the range of fp32: use --precision bf16",
        )
    return errors[0], errors[1]


def check_request(
    checkpoint: Checkpoint,
    engine: str,
    capabilities: Sequence[str] | None,
    precision: str,
    profile: Profile | None = None,
    onnx_only: bool = False,
    memory: int | None = None,
) -> tuple[str, ...]:
    """Refuse what cannot be exported, before the long work.

    Returns the compute capabilities; where none were given, the default ones that can hold the schemes. Classic
    TensorRT has none: it builds for the GPU it runs on. `memory` is a limit on the builder's, in bytes.
    """
    if engine not in MODULES:
        raise InputError(f"--engine {engine}: one of {', '.join(MODULES)} was expected")
    if precision not in ("fp16", "bf16"):
        raise InputError(f"--precision {precision}: fp16 or bf16 was expected")
    profile = profile or default_profile(checkpoint.config)
    check_positions(checkpoint.config, profile)
    chosen = _capabilities(checkpoint, engine, capabilities)
    _check_kind(checkpoint)
    check_schemes(checkpoint, supports, "TensorRT")
    _check_siblings(checkpoint)
    if chosen and (reason := too_old(checkpoint.schemes.values(), precision, chosen)):
        raise UnsupportedError(reason, "name later capabilities with --sm, or quantize with another recipe")
    if not onnx_only:
        _check_builder(checkpoint, engine, profile)
        check_memory(planned_cost(checkpoint, precision), memory)
    return chosen


def _capabilities(checkpoint: Checkpoint, engine: str, asked: Sequence[str] | None) -> tuple[str, ...]:
    """The compute capabilities that a plan is built for; InputError for impossible ones."""
    if engine == "trt":
        if asked is not None:
            raise InputError(
                f"--sm {' '.join(asked)}: --engine trt takes no compute capability",
                "leave --sm away: TensorRT builds for the GPU it runs on",
            )
        return ()
    chosen = fitting(checkpoint.schemes.values(), DEFAULT) if asked is None else tuple(dict.fromkeys(asked))
    unknown = [name for name in chosen if name not in CAPABILITIES]
    if unknown or not chosen:
        raise InputError(f"--sm {' '.join(unknown) or 'without a value'}: known are {', '.join(CAPABILITIES)}")
    return chosen


def _check_kind(checkpoint: Checkpoint) -> None:
    """Refuse outer matrices of floats, and mixtures of more experts than are all computed."""
    for name in checkpoint.config.outer_matrices():
        if name in checkpoint.schemes and checkpoint.schemes[name].type != "int":
            raise UnsupportedError(
                f"{name}: TensorRT exports hold integers there, or 16 bits", "quantize linears alone"
            )
    if checkpoint.config.sparse_layers and checkpoint.config.num_experts > MOST_EXPERTS:
        raise UnsupportedError(
            f"{checkpoint.name}: a mixture of {checkpoint.config.num_experts} experts cannot be exported to TensorRT: "
            f"it takes no loop over the chosen ones, so all are computed, and that is done for up to {MOST_EXPERTS}",
            "`qwen3-export onnx` and `gguf` export it",
        )


def _check_siblings(checkpoint: Checkpoint) -> None:
    """Refuse 8-bit groups in two linears that read one input.

    TensorRT fuses such linears and stores their weights twice.
    """
    for layer in range(checkpoint.config.num_layers):
        for stage in checkpoint.config.block(layer).stages:
            names = [f"{block_name(layer)}.{name}" for name in stage.names]
            found = [name for name in names if _in_8_bit_groups(checkpoint.schemes.get(name))]
            if len(found) > 1:
                raise UnsupportedError(
                    f"{found[0]} and {found[1]} are 8-bit integers in groups: TensorRT joins what reads one input, and "
                    "stores these twice",
                    "use strategy: channel for 8 bits, or 4 bits in groups",
                )


def _in_8_bit_groups(scheme: QuantScheme | None) -> bool:
    return scheme is not None and (scheme.type, scheme.num_bits, scheme.strategy) == ("int", 8, "group")


def _check_builder(checkpoint: Checkpoint, engine: str, profile: Profile) -> None:
    """Raise MissingRuntimeError without the engine's library; `trt`'s hint shows the `trtexec` line."""
    if importlib.util.find_spec(MODULES[engine]) is not None:
        return
    hint = INSTALL[engine]
    if engine == "trt":
        line = trtexec_line(Path(MODEL), Path(PLAN), profiles_of(checkpoint, profile))
        hint = f"{hint}; or write the ONNX here with --onnx-only, and on the device, inside that folder: {line}"
    raise MissingRuntimeError(f"--engine {engine} needs the {MODULES[engine]} package", hint)


def planned_bytes(checkpoint: Checkpoint, precision: str = "fp16") -> int:
    """Predicted size of the output folder, ONNX and plan, from shapes alone."""
    block = _QUANTIZED_BLOCK_BYTES if checkpoint.schemes else _BLOCK_BYTES
    block += _SECOND_PROFILE_BYTES * (len(profiles_of(checkpoint, default_profile(checkpoint.config))) - 1)
    plan = onnx_size.weight_bytes(checkpoint, precision) + _ENGINE_BYTES + block * checkpoint.config.num_layers
    return onnx_size.planned_bytes(checkpoint, precision) + plan
