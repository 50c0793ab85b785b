"""Starting a run: torchrun and Slurm."""
