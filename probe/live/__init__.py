"""The drop-in probe: attached to a running training, it says what each update does to the policy's entropy."""

from probe.live.forecast import Forecast
from probe.live.settings import WatchSettings
from probe.live.watcher import Alarm, Watch, watch

__all__ = ["Alarm", "Forecast", "Watch", "WatchSettings", "watch"]
