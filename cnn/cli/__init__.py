"""Options and tools of ``python -m cnn``; its commands are in ``cnn.__main__``."""
