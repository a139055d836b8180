"""The phases of a probe, shared by a run and a training."""
