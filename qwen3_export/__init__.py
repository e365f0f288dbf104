"""qwen3-export: Qwen3 checkpoint → quantized → ONNX, GGUF, TensorRT → proven in its own runtime.

    solve → ship → run → prove, over files on disk

`core` knows tensors and files, `model` the torch forward pass, `solve` quantizes, `ship` writes
formats, `run` asks runtimes for logits, `prove` compares them; `cli` is the only place that prints.
"""

__version__ = "0.1.0"
