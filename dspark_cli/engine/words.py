"""Words of the command line that the engine gives a meaning to; imports nothing, so that `--help` can."""

#: a drafter that is not one of these words is a path
DRAFTER_WORDS = ("auto", "dspark", "dflash", "eagle3", "small", "lookup", "none")
DEFAULT_POLICY = "auto"
