"""Makers of the generated calibration documents, one module a domain."""
