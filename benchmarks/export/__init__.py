"""Time and memory of an ONNX export, beside onnxruntime-genai's builder."""
