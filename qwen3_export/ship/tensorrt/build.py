"""Child process of `ship.tensorrt`: ONNX in, plan out, one JSON line on stdout.

    python -m qwen3_export.ship.tensorrt.build '{"module": …, "onnx": …, "plan": …, …}'

One optimization profile serves prefill and decode, because two would store 16-bit weights twice;
the plan is streamed to the file, so that it never exists in memory a second time.
"""

from __future__ import annotations

import errno
import importlib
import json
import sys
from typing import Any

from qwen3_export.core.process import end_with_parent

_HARMLESS = ("has Int64 binding", "cudaError 35")


class BuildError(Exception):
    """What TensorRT said when it refused."""


def build(request: dict[str, Any]) -> dict[str, Any]:
    """Parse, configure and build; returns `{version, warnings}`."""
    trt = importlib.import_module(request["module"])
    log = _logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    _parse(trt, network, log, request["onnx"])
    config = builder.create_builder_config()
    names = request["capabilities"]
    if names:
        config.num_compute_capabilities = len(names)
        for index, name in enumerate(names):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{name.replace('.', '')}"), index)
    _add_profile(builder, network, config, request["max_prompt"], request["max_context"])
    with open(request["plan"], "wb") as file:
        writer = _writer(trt, file)
        done = builder.build_serialized_network_to_stream(network, config, writer)
    if writer.error is not None:
        raise writer.error
    if not done:
        raise BuildError(log.reason())
    return {"version": trt.__version__, "warnings": log.warnings}


def _logger(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if any(text in message for text in _HARMLESS):
                return
            if int(severity) <= int(trt.ILogger.ERROR):
                self.errors.append(message)
            elif int(severity) == int(trt.ILogger.WARNING):
                self.warnings.append(message)

        def reason(self) -> str:
            return " ".join(self.errors[:1] or ["no reason given"]).splitlines()[0]

    return Log()


def _writer(trt: Any, file: Any) -> Any:
    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.error: OSError | None = None

        def write(self, data: bytes) -> int:
            try:
                return file.write(data)
            except OSError as error:  # an exception must not cross the library: it is raised afterwards
                self.error = error
                return 0

    return Writer()


def _parse(trt: Any, network: Any, log: Any, path: str) -> None:
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(path) or network.num_outputs == 0:
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        raise BuildError("; ".join(f"{e.node_operator()} {e.node_name()}: {e.desc()}" for e in errors) or log.reason())
    unused = [text for text in log.warnings if "Unused Input" in text]
    if unused:
        raise BuildError(f"an input would be ignored: {unused[0]}")
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            # Without a fused kernel for a shape or type, attention may be built from its parts.
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True


def _add_profile(builder: Any, network: Any, config: Any, prompt: int, context: int) -> None:
    """Shapes as (smallest, likely, largest).

    The mask is as long as past and prompt together.
    """
    likely = max(1, prompt // 2)
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shape = list(tensor.shape)
        if tensor.name in ("input_ids", "position_ids"):
            profile.set_shape(tensor.name, (1, 1), (1, likely), (1, prompt))
        elif tensor.name == "attention_mask":
            profile.set_shape(tensor.name, (1, 1), (1, likely), (1, prompt + context))
        else:
            profile.set_shape(tensor.name, *((1, shape[1], past, shape[3]) for past in (0, 0, context)))
    config.add_optimization_profile(profile)


def main() -> None:
    """Build what the argument asks for; failures are answers too."""
    end_with_parent()
    try:
        answer = build(json.loads(sys.argv[1]))
    except BuildError as error:
        answer = {"error": str(error), "kind": "unsupported"}
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        answer = {"error": "the disk is full" if full else str(error), "kind": "resource"}
    except MemoryError:
        answer = {"error": "out of memory while building the plan", "kind": "resource"}
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
