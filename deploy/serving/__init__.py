"""Models as servers of others want them: Triton's repositories, DeepStream's configuration and box parser."""
