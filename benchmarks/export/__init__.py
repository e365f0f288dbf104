"""What an ONNX export costs, beside onnxruntime-genai's builder."""
