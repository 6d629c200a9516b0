"""The laboratory: what measures this project itself. Nothing of the product imports it."""
