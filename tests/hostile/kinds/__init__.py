"""One file per kind of hostile input, found by its name; each has `make(random, place) -> Trial`."""
