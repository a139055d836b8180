"""Prompts, rewards and the batch of rollouts that everything else works on."""
