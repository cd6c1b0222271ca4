"""What is published about GPUs, and the time of one product that follows from it."""
