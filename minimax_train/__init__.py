"""Pretraining of hybrid linear-attention mixture-of-experts models."""
