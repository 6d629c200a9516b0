"""A student by budget: which there are, what each takes on the target, the most multiplications, short trainings."""
