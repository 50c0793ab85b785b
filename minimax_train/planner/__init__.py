"""What a run would take, before there are GPUs for it: ``minimax-plan``."""
