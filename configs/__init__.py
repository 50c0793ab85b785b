"""Hydra groups: model, data, parallel, engine, recipe, checkpoint, logging, experiment."""
