"""What a run reports: console, metrics.jsonl, Weights & Biases, the loss curve."""
