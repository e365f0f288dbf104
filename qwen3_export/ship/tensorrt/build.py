"""Child process of `ship.tensorrt`: ONNX in, plan out, one JSON line on stdout.

    python -m qwen3_export.ship.tensorrt.build '{"module": …, "onnx": …, "plan": …, …}'

The plan is streamed to its file, so that memory never holds a second copy.
"""

from __future__ import annotations

import errno
import importlib
import json
import sys
import time
from typing import Any

from qwen3_export.core.memory import lacks_memory
from qwen3_export.core.process import end_with_parent
from qwen3_export.core.progress import peak_rss_bytes

_HARMLESS = ("has Int64 binding", "cudaError 35")


class BuildError(Exception):
    """TensorRT refuses the network; the message is TensorRT's reason."""


def build(request: dict[str, Any]) -> dict[str, Any]:
    """Parse, configure and build; returns `{version, warnings, peak_rss_bytes, cpu_seconds}`."""
    trt = importlib.import_module(request["module"])
    log = _logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(_strongly_typed(trt))
    _parse(trt, network, log, request["onnx"])
    config = builder.create_builder_config()
    names = request["capabilities"]
    if names:
        config.num_compute_capabilities = len(names)
        for index, name in enumerate(names):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{name.replace('.', '')}"), index)
    for shapes in request["profiles"]:
        _add_profile(builder, network, config, shapes)
    with open(request["plan"], "wb") as file:
        writer = _writer(trt, file)
        done = builder.build_serialized_network_to_stream(network, config, writer)
    if writer.error is not None:
        raise writer.error
    if not done:
        raise BuildError(log.reason())
    # Said by the compiler, not by the parser.
    unused = [text for text in log.warnings if "Unused Input" in text]
    if unused:
        raise BuildError(f"an input would be ignored: {unused[0]}")
    cost = {"peak_rss_bytes": peak_rss_bytes(), "cpu_seconds": time.process_time()}
    return {"version": trt.__version__, "warnings": log.warnings, **cost}


def _strongly_typed(trt: Any) -> int:
    """Flag for a strongly typed network; 0 from TensorRT 11 on, where all are."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


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
            except OSError as error:  # must not cross the C++ library: `build` raises it afterwards
                self.error = error
                return 0

    return Writer()


def _parse(trt: Any, network: Any, log: Any, path: str) -> None:
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(path) or network.num_outputs == 0:
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        raise BuildError("; ".join(f"{e.node_operator()} {e.node_name()}: {e.desc()}" for e in errors) or log.reason())
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            # Where no fused attention kernel fits, TensorRT may use separate ones.
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True


def _add_profile(builder: Any, network: Any, config: Any, shapes: dict[str, list[list[int]]]) -> None:
    """Add an optimization profile: each input's (smallest, likely, largest) shape."""
    names = {network.get_input(index).name for index in range(network.num_inputs)}
    if names != set(shapes):
        raise BuildError(f"the graph has other inputs than the profile: {', '.join(sorted(names ^ set(shapes)))}")
    profile = builder.create_optimization_profile()
    for name, (smallest, likely, largest) in shapes.items():
        profile.set_shape(name, tuple(smallest), tuple(likely), tuple(largest))
    if config.add_optimization_profile(profile) < 0:
        raise BuildError("TensorRT refuses the profile's shapes")


def main() -> None:
    """Build what the argument asks for, and print the answer, failures too."""
    end_with_parent()
    try:
        answer = build(json.loads(sys.argv[1]))
    except BuildError as error:
        kind = "memory" if lacks_memory(error) else "unsupported"
        answer = {"error": str(error), "kind": kind}
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        answer = {"error": "the disk is full" if full else str(error), "kind": "resource"}
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        answer = {"error": str(error) or type(error).__name__, "kind": "memory"}
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
