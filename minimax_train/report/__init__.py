"""``minimax-report``: runs side by side, as one page that needs no network."""
