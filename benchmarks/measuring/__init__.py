"""What is measured, on what, and how sure it is: environment, power, COCO metrics, result files."""
