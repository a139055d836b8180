"""Settings of the update from the training arguments beside a checkpoint."""

from probe.config.given import changed_keys, given_keys
from probe.from_checkpoint.fill import fill_settings, filled_config
from probe.from_checkpoint.sources import SettingSources

__all__ = ["SettingSources", "changed_keys", "fill_settings", "filled_config", "given_keys"]
