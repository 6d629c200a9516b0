"""What stands beside the steps of a training: runner, hooks, guard, precision, processes, the check of the teacher."""
