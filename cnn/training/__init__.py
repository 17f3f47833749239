"""Training runs, their files, and the use of trained models."""
