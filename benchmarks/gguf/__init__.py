"""GGUF files beside llama.cpp's own quantizer: quality, size and speed, all measured in llama.cpp."""
