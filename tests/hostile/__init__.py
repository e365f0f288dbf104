"""A seeded campaign of damaged, odd and hostile inputs; see `campaign`."""
