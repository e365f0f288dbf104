"""ONNX folders of any tool beside each other: a judge that shares no code with the package."""
