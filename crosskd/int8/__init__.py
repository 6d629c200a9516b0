"""INT8-aware training: fake quantisation, and the student's quantised graph."""
