"""Numbers and verdicts. Imports neither torch nor mmdet."""
