"""The torch forward pass of Qwen3, one block at a time; shared by solving and by the torch runtime."""
