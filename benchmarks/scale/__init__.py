"""The large models on one small machine: memory, time and disk per layer, beside what `plan` says beforehand."""
