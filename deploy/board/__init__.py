"""What runs on a board out of a bundle: Python 3.8, numpy and TensorRT."""
