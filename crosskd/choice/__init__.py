"""A student by budget: which there are, what each takes on the target, and the one with the most multiplications."""
