"""The probe of one update, under its former address; it lives in `probe.live.step`."""

from probe.live.step import UpdateProbe

__all__ = ["UpdateProbe"]
