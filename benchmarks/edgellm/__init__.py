"""Whether TensorRT Edge-LLM's own export takes our quantized folders."""
