"""Many prompts from files, answered several at a time, and kept safe from whatever ends the run."""
