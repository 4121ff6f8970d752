"""dspark: local language models, the same answer sooner."""

import os

__version__ = "0.1.0"

# Before numpy loads: waking its BLAS's threads for the small products of a draft takes four times as long as they do.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
