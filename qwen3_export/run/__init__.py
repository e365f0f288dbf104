"""Artifacts in their own runtimes: open, prefill, decode → fp32 logits.

One file per runtime.
"""
