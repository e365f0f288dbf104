"""Artifacts in their own runtimes: open, prefill, decode → fp32 logits.

There is one module per runtime.
"""
