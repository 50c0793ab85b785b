"""The process grid and everything that moves tokens or weights across it. Knows no model, config or file."""

import os

# Read when CUDA starts, which whoever first asks for GPUs may cause. Streams share 8 hardware queues if not told
# otherwise: what comes in one after a transfer that waits for its turn waits with it, as a layer for all weights that
# are gathered.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
