"""The process grid and everything that moves tokens or weights across it. Knows no model, config or file."""
