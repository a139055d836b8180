"""What single parts of an update add to deltaH1."""
