"""The torch forward pass of Qwen3, one block at a time.

Shared by solving and by the torch runtime.
"""
