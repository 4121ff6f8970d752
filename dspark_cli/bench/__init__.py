"""Measurements: interleaved arms in one process, always with plain decoding among them."""
