"""Context parallelism: which tokens of a packed sequence a rank holds, and attention over all of it."""
