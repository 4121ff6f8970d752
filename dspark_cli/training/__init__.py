"""Training a drafter for any target the program runs: documents -> features -> train -> evaluate -> export."""
