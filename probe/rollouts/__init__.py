"""Rollouts: drawing prompts, sampling responses, reading and writing them."""
