"""Boards: their list, SSH to them, and what measures on them."""
