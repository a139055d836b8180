"""The drop-in probe: attached to a running training, it says what each update does to the policy's entropy."""

from probe.forecast.forecast import Forecast
from probe.live.alarm import Alarm
from probe.live.attribution import HostUpdate
from probe.live.ranks import follow_first_rank
from probe.live.settings import WatchSettings
from probe.live.watch import Watch, watch

__all__ = ["Alarm", "Forecast", "HostUpdate", "Watch", "WatchSettings", "follow_first_rank", "watch"]
