"""Speed of one model in several runtimes, beside the memory bandwidth that bounds it."""
