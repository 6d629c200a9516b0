"""From a checkpoint to a running engine. Imports neither torch nor mmdet (but for deploy/export.py)."""
