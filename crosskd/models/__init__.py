"""Detectors, heads, losses, backbones and their checkpoints."""
