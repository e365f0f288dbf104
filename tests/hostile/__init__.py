"""Fuzzing: a seeded campaign of damaged, odd and hostile inputs; see `campaign`."""
