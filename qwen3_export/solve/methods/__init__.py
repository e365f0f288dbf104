"""One file per quantization method; the file's name is the recipe's `method`."""
