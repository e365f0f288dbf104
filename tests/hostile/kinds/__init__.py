"""One module per kind of hostile input, each with `make(random, place) -> Trial`."""
