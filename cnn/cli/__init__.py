"""What ``python -m cnn`` is asked and shows; its commands are in ``cnn.__main__``."""
