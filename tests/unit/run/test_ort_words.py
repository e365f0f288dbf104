"""ONNX Runtime's errors, as they were said, and what of them a user needs."""

from __future__ import annotations

import pytest

from qwen3_export.run.ort_words import reason_of

LONG = (
    "[ONNXRuntimeError] : 1 : FAIL : Exception during initialization: /onnxruntime_src/onnxruntime/core/optimizer/"
    "optimizer_execution_frame.cc:74 onnxruntime::OptimizerExecutionFrame::Info::Info(const std::vector<const "
    "onnxruntime::Node*>&, const std::function<bool(const std::__cxx11::basic_string<char>&)>&) "
)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (
            f"{LONG}[ONNXRuntimeError] : 1 : FAIL : tensorprotoutils.cc:1876 GetExtDataFromTensorProto External "
            "initializer: w offset: 0 size to read: 16 given file_length: 10 are out of bounds.\n",
            "External initializer: w offset: 0 size to read: 16 given file_length: 10 are out of bounds.",
        ),
        (f"{LONG}status.IsOK() was false. No room", "status.IsOK() was false. No room"),
        (
            "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running Reshape node. "
            "Name:'r' Status Message: /src/core/providers/cpu/tensor/reshape_helper.h:47 onnxruntime::ReshapeHelper::"
            "ReshapeHelper(const onnxruntime::TensorShape&, onnxruntime::TensorShapeVector&, bool) input_shape_size "
            "== size was false. Input shape:{2}\n",
            "Non-zero status code returned while running Reshape node. Name:'r' Status Message: input_shape_size == "
            "size was false. Input shape:{2}",
        ),
        ("[ONNXRuntimeError] : 10 : INVALID_GRAPH : This is an invalid model", "This is an invalid model"),
        ("a shape differs", "a shape differs"),
        ("", "RuntimeError"),
        ("[ONNXRuntimeError] : 1 : FAIL : ", "RuntimeError"),
    ],
)
def test_the_reason_without_places_in_the_source(said: str, reason: str) -> None:
    assert reason_of(RuntimeError(said)) == reason
