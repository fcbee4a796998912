"""One file per model family: its components and sizes."""
