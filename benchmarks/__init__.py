"""Benchmarks beside the peers, in one run, compared by ratios of medians."""
