"""The demo policy: a small model that is made on the spot, so that the probe can be tried without any download."""

from probe.demo.cache import ensure_demo_checkpoint
from probe.demo.recipe import DemoRecipe

__all__ = ["DemoRecipe", "ensure_demo_checkpoint"]
