"""The arithmetic of the probe: pure functions on batches and token scores, one estimator per file."""
