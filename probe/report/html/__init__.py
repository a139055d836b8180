"""A run or a training as one self-contained HTML page."""
