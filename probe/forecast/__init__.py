"""When the entropy of a training falls to a threshold, with an interval."""

from probe.forecast.forecast import Forecast, forecast
from probe.forecast.readings import EntropyReading

__all__ = ["EntropyReading", "Forecast", "forecast"]
