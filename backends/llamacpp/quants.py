"""Formats that the gguf package writes by itself. Imports nothing heavy: commands check what was typed against it."""

#: what a drafter's matrix may be stored as -> number in general.file_type
QUANTS = {"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7, "Q5_1": 9, "Q5_0": 8, "Q4_1": 3, "Q4_0": 2}
